"""Fine-tuning: a base model made at the top of the script, frozen, with augmentation in front."""

import keras
import keras_tuner as kt
import numpy as np

generator = np.random.default_rng(0)
x = generator.uniform(size=(64, 32, 32, 3)).astype("float32")
y = keras.utils.to_categorical(generator.integers(0, 4, 64), 4)

base = keras.Sequential(
    [keras.Input((32, 32, 3)), keras.layers.Conv2D(8, 3, 2, activation="relu"), keras.layers.GlobalAveragePooling2D()]
)
base.trainable = False
augment = keras.Sequential([keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)])


def build_model(hp):
    inputs = keras.Input((32, 32, 3))
    hidden = base(augment(inputs), training=False)
    hidden = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.25))(hidden)
    model = keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(hidden))
    model.compile("adam", keras.losses.CategoricalCrossentropy(label_smoothing=0.1), metrics=["accuracy"])
    return model


tuner = kt.GridSearch(build_model, objective="val_loss", directory="searches", project_name="base")
tuner.search(x, y, epochs=1, validation_split=0.25, verbose=0)
tried = {trial.hyperparameters.values["dropout"] for trial in tuner.oracle.trials.values()}
assert tried == {0.0, 0.25, 0.5}, tried
