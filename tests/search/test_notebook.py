"""A notebook whose functions are its own: `tuner.search` works there, and prints plain lines."""

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]' brings nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="pip install -e '.[test]' brings nbclient and ipykernel")

CELLS = (
    "%matplotlib inline\nimport keras, numpy as np, accumtune\nWIDTH = 4",
    """
x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
y = x.sum(axis=1, keepdims=True)

def build_model(hp):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(WIDTH), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-1)), loss=own_loss)
    return model

def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

class Note(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["noted"] = WIDTH
""",
    """
tuner = accumtune.RandomSearch(
    build_model, objective="val_loss", max_trials=2, seed=1, memory_budget="16MiB", micro_batch_sizes=(4, 8),
    accumulation_steps=(1, 2), tracking_uri=False, directory=".", project_name="notebook")
tuner.search(x, y, validation_data=(x, y), epochs=1, callbacks=[Note()])
""",
    """
assert [trial.status for trial in tuner.record().trials] == ["completed"] * 2
config = tuner.get_best_config()
config.build(build_model).fit(x, y, verbose=0, **config.fit_arguments(epochs=1))
""",
)


@pytest.mark.slow
def test_a_notebook_searches_with_functions_of_its_own(tmp_path):
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[2].outputs)
    assert "[2/2]   → val_loss" in printed and "\x1b" not in printed
