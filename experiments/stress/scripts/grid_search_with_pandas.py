"""GridSearch of a regression on a pandas table, and the winner trained again for its best number of epochs."""

import keras
import keras_tuner as kt
import numpy as np
import pandas as pd

generator = np.random.default_rng(0)
table = pd.DataFrame(generator.normal(size=(120, 4)), columns=["age", "rooms", "size", "price"])
table["price"] = 3 * table["age"] - table["rooms"] + 0.1 * generator.normal(size=120)
train = table.sample(frac=0.8, random_state=1)
held_out = table.drop(train.index)


def build_model(hp):
    model = keras.Sequential([keras.Input((3,))])
    model.add(keras.layers.Dense(hp.Choice("units", [4, 8]), activation=hp.Choice("activation", ["relu", "tanh"])))
    if hp.Boolean("dropout"):
        model.add(keras.layers.Dropout(0.2))
    model.add(keras.layers.Dense(1))
    model.compile(keras.optimizers.Adam(0.01), loss="mse", metrics=["mae", keras.metrics.RootMeanSquaredError()])
    return model


tuner = kt.GridSearch(
    build_model,
    objective=kt.Objective("val_root_mean_squared_error", direction="min"),
    max_trials=4,
    executions_per_trial=1,
    directory="searches",
    project_name="prices",
)
tuner.search(
    train[["age", "rooms", "size"]],
    train["price"],
    epochs=3,
    validation_split=0.2,
    callbacks=[keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)],
    verbose=0,
)
tuner.results_summary()
assert len(tuner.oracle.trials) == 4
best = tuner.get_best_hyperparameters()[0]
model = tuner.hypermodel.build(best)
history = model.fit(train[["age", "rooms", "size"]], train["price"], epochs=2, validation_split=0.2, verbose=0)
best_epoch = int(np.argmin(history.history["val_loss"])) + 1
model.fit(train[["age", "rooms", "size"]], train["price"], epochs=best_epoch, verbose=0)
assert np.isfinite(model.evaluate(held_out[["age", "rooms", "size"]], held_out["price"], verbose=0)).all()
