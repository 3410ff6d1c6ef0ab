"""Secrets in texts and addresses are replaced, whatever characters they contain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accumtune.tracking.mlflow import replay
from accumtune.tracking.redaction import first_line, redacted, redacted_value
from accumtune.tracking.tracking_uri import server_of, without_credentials

SCHEMES = ("http", "https", "postgresql", "postgresql+psycopg", "mysql+pymysql", "mssql+pyodbc")
# Every letter is of the secret alone, so that any rest of it is found.
MARKED = st.text(alphabet="ÄÖÜ", min_size=3, max_size=4)
SPECIAL = st.text(alphabet="#?/@:&=%+;,!$'\"`|<>()[]{}\\~^*.-", min_size=1, max_size=4)
SECRETS = st.tuples(MARKED, SPECIAL, MARKED, SPECIAL, MARKED).map("".join)


def letters_in(text):
    return set(text) & set("ÄÖÜ")


@given(scheme=st.sampled_from(SCHEMES), secret=SECRETS)
def test_no_part_of_a_password_stays_in_an_address(scheme, secret):
    address = f"{scheme}://me:{secret}@db.example:5432/mlflow?sslmode=require"
    assert without_credentials(address) == f"{scheme}://db.example:5432/mlflow?sslmode=require"
    assert not letters_in(redacted(f"cannot reach {address}, tried twice"))
    assert not letters_in(first_line("x" * 260 + f" {address}")), "it is cut after it was redacted"


@given(secret=SECRETS.map(lambda text: text.replace("&", "")), name=st.sampled_from(["password", "access_token"]))
def test_no_secret_parameter_stays_in_an_address(secret, name):
    assert not letters_in(without_credentials(f"https://host/x?b=1&{name}={secret}"))


NAMES = (
    "password", "PASSWORD", "passwd", "passphrase", "pwd", "secret", "client_secret", "api_key", "api-key", "apiKey",
    "X-Api-Key", "access_token", "accessToken", "refresh_token", "auth_token", "token", "HF_TOKEN", "MY_TOKEN",
    "aws_secret_access_key", "AccountKey", "private_key", "credentials", "Authorization", "Set-Cookie", "db_password",
)  # fmt: skip
PATTERNS = ("{}={}", "{}: {}", "{} = {}", '"{}": "{}"', "'{}': '{}'", '{{"{}":"{}"}}', "--{} {}", "{}=>{}", "{}%3D{}")


@given(name=st.sampled_from(NAMES), pattern=st.sampled_from(PATTERNS), secret=SECRETS)
def test_no_named_secret_stays_in_a_text(name, pattern, secret):
    text = redacted("before " + pattern.format(name, secret) + " after\nnext line")
    assert not letters_in(text) and text.startswith("before ") and text.endswith(" after\nnext line")


@given(scheme=st.sampled_from(["Bearer", "bearer", "Authorization: Basic", "authorization: token"]), secret=SECRETS)
def test_no_header_stays_in_a_text(scheme, secret):
    assert not letters_in(redacted(f"header {scheme} {secret}"))


@given(st.text(alphabet="paswordtken=:/@\"' .\\\n", max_size=60))
def test_what_was_redacted_stays_as_it_is(text):
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "token_accuracy: 0.98 max_tokens=512 pad_token=0 tokenizer=bert num_tokens: 3",
        "Epoch 3/5 - loss: 0.5 - key_dim: 7", "KeyError: 'width'", "sqlite:////home/me@work/mlflow.db",
        "see https://example.org/a and write to me@example.org",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_told(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    "token", ["hf_" + "a" * 34, "ghp_" + "a1" * 18, "sk-" + "b" * 40, "AKIA" + "A" * 16, "eyJhbGciOi.eyJzdWIiOi.abc-_"]
)
def test_tokens_are_known_by_their_shape(token):
    assert redacted(f"got {token}!") == "got ...!"


def test_hyperparameters_are_told_unless_their_name_says_otherwise():
    assert redacted_value("api_key", "abc") == redacted_value("model/password", "abc") == "..."
    assert redacted_value("note", 'token=a"b') == "token=..."
    assert (redacted_value("tokenizer", "bert"), redacted_value("max_tokens", 7)) == ("bert", 7)


@pytest.mark.parametrize("ends", ["\n", "\r"])
@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_log_that_is_cut_inside_an_address(tmp_path, monkeypatch, cut, ends):
    text = f"first{ends}postgresql://me:ÄÖÜÄÖÜÄÖÜ@db/x Bearer ÄÖÜÄÖÜÄÖÜ{ends}last line"
    monkeypatch.setattr(replay, "_MAXIMUM_LOG_BYTES", len(text.encode()) - cut)
    (tmp_path / "log.txt").write_bytes(text.encode())
    log = replay._read_log(tmp_path / "log.txt")
    assert log.endswith("last line") and not letters_in(log)


def test_a_log_of_one_line_that_is_cut_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "_MAXIMUM_LOG_BYTES", 10)
    (tmp_path / "log.txt").write_text("password=" + "x" * 50)
    assert replay._read_log(tmp_path / "log.txt") == ""


def test_the_passwords_of_known_addresses_are_replaced_wherever_they_stand(monkeypatch):
    """A driver may tell the parts of what it could not read."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:of-the-env%23@db/x")
    text = redacted('host "of-the-env#" of-the-env%23 of-the-call', "http://me:of-the-call@host")
    assert text == 'host "..." ... ...'


def test_a_server_is_read_as_its_driver_reads_it():
    assert server_of("postgresql+psycopg://me:a#b/c?d@db:77/x") == ("postgresql", "db", 77)
    assert server_of("https://me:pw@host/x") == ("https", "host", None)
    assert server_of("sqlite:///x.db") is None is server_of("databricks")
    for broken in ("http://host:port", "postgresql://host:port"):
        with pytest.raises(ValueError):
            server_of(broken)
