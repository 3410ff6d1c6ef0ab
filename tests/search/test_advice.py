"""What a search tells its user before it begins."""

from accumtune.search.advice import advice


def texts(**changes):
    settings = {
        "hyperparameters": ["width", "learning_rate"], "effective_batch_sizes": (8, 64), "learning_rate_scaling": None,
        "batch_coupled_layers": [], "searches_pairs": False,
    }  # fmt: skip
    return advice(**{**settings, **changes})


def test_nothing_to_say():
    assert texts() == []
    assert texts(hyperparameters=["width", "lr"]) == []
    assert texts(hyperparameters=["width"], learning_rate_scaling="sqrt") == []
    assert texts(hyperparameters=["width"], effective_batch_sizes=(64,)) == []


def test_a_fixed_learning_rate_with_many_batches():
    (text,) = texts(hyperparameters=["width", "filters"])
    assert "learning_rate_scaling" in text


def test_coupled_layers_are_named_with_what_follows():
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"], searches_pairs=True)
    assert "bn_1" in text and "are searched too" in text
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"])
    assert "search_over='pairs'" in text
