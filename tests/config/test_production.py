"""A configuration builds and trains a model in this process."""

import sys

import forked
import numpy as np
import pytest
from made_config import build_model, config_of, data, hyperparameters
from running import WITHOUT_ACCUMTUNE


def test_build_replays_the_hyperparameters_and_accumulates():
    import keras

    config = config_of(hyperparameters={"width": 16, "learning_rate": 0.05})
    x, y = data(64)
    keras.utils.set_random_seed(1)
    model = config.build(build_model)
    assert model.layers[0].units == 16 and float(model.optimizer.learning_rate) == pytest.approx(0.05)
    model.fit(x, y, verbose=0, shuffle=False, **config.fit_arguments(epochs=2))
    assert int(model.optimizer.iterations) == 4, "updates, not micro-steps"
    keras.utils.set_random_seed(1)
    plain = build_model(hyperparameters(config))
    plain.fit(x, y, verbose=0, shuffle=False, batch_size=32, epochs=2)
    for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_build_scales_the_learning_rate_as_the_search_did():
    scaled = {"learning_rate_scaling": "sqrt", "base_effective_batch_size": 8}
    config = config_of(hyperparameters={"learning_rate": 0.05}, **scaled)
    assert float(config.build(build_model).optimizer.learning_rate) == pytest.approx(0.05 * 2)


def test_accumulate_takes_a_model_built_elsewhere():
    config = config_of()
    model = config.accumulate(build_model(hyperparameters(config)))
    model.fit(*data(32), verbose=0, **config.fit_arguments(epochs=1))
    assert int(model.optimizer.iterations) == 1


def test_another_precision_is_told():
    with pytest.warns(UserWarning, match="mixed_float16"):
        config_of(precision_policy="mixed_float16").build(build_model)


def test_what_the_search_gave_to_fit_is_given_again():
    options = {"shuffle": "batch", "class_weight": {"0": 1.0, "1": 2.5}, "steps_per_epoch": 7}
    arguments = config_of(fit_options=options).fit_arguments(verbose=0)
    assert arguments["class_weight"] == {0: 1.0, 1: 2.5} and arguments["shuffle"] == "batch"
    assert arguments["steps_per_epoch"] == 7 and arguments["verbose"] == 0


def test_a_model_that_was_trained_so_loads_without_accumtune(tmp_path):
    config = config_of(hyperparameters={"width": 4})
    model = config.build(build_model)
    model.fit(*data(64), verbose=0, **config.fit_arguments())
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", data(64)[0])
    script = (
        WITHOUT_ACCUMTUNE + "import keras, numpy; model = keras.models.load_model('model.keras')\n"
        "numpy.save('y.npy', model.predict(numpy.load('x.npy'), verbose=0))"
    )
    done = forked.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(data(64)[0], verbose=0), rtol=1e-6)
