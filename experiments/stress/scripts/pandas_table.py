"""A table as pandas frames, an adapted Normalization layer as a global, class weights and a validation split."""

import keras
import keras_tuner as kt
from sklearn.datasets import load_breast_cancer

data = load_breast_cancer(as_frame=True)
features, target = data.data.sample(frac=1, random_state=0), data.target.sample(frac=1, random_state=0)

normalize = keras.layers.Normalization()
normalize.adapt(features.to_numpy("float32"))
weights = {0: len(target) / (2 * (target == 0).sum()), 1: len(target) / (2 * (target == 1).sum())}


def build_model(hp):
    model = keras.Sequential([keras.Input((features.shape[1],)), normalize])
    model.add(keras.layers.Dense(hp.Choice("units", [8, 16]), activation=hp.Choice("activation", ["relu", "tanh"])))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy", keras.metrics.AUC(name="auc")])
    return model


tuner = kt.RandomSearch(build_model, kt.Objective("val_auc", "max"), max_trials=2, directory="searches")
tuner.search(features, target, epochs=5, validation_split=0.25, class_weight=weights, verbose=0)
assert tuner.oracle.get_best_trials(1)[0].score > 0.7
