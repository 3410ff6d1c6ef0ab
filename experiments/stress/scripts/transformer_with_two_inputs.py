"""A transformer block of one's own on token ids beside a table, as a dict of inputs, with class weights."""

import keras
import keras_tuner as kt
import numpy as np

generator = np.random.default_rng(0)
x = {
    "tokens": generator.integers(0, 50, size=(96, 12)),
    "table": generator.normal(size=(96, 3)).astype("float32"),
}
y = (x["table"].sum(axis=1) > 0.5).astype("int64")


class TransformerBlock(keras.layers.Layer):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(heads, width)
        self.feed_forward = keras.Sequential([keras.layers.Dense(2 * width, "relu"), keras.layers.Dense(width)])
        self.norms = [keras.layers.LayerNormalization(), keras.layers.LayerNormalization()]
        self.dropout = keras.layers.Dropout(dropout)

    def call(self, inputs, training=None):
        x = self.norms[0](inputs + self.dropout(self.attention(inputs, inputs), training=training))
        return self.norms[1](x + self.feed_forward(x))


class Classifier(keras.Model):
    """Makes its layers when it is built."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.width, self.heads, self.rate = width, heads, dropout

    def build(self, input_shape):
        self.embedding = keras.layers.Embedding(50, self.width, mask_zero=False)
        self.block = TransformerBlock(self.width, self.heads, self.rate)
        self.pooling = keras.layers.GlobalAveragePooling1D()
        self.out = keras.layers.Dense(2, activation="softmax")

    def call(self, inputs, training=None):
        text = self.pooling(self.block(self.embedding(inputs["tokens"]), training=training))
        return self.out(keras.ops.concatenate([text, inputs["table"]], axis=-1))


class TransformerModel(kt.HyperModel):
    def build(self, hp):
        model = Classifier(hp.Choice("width", [4, 8]), hp.Int("heads", 1, 2), hp.Float("dropout", 0.0, 0.2, step=0.1))
        rate = hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model


tuner = kt.BayesianOptimization(
    TransformerModel(), objective="val_loss", max_trials=2, directory="searches", project_name="text", overwrite=True
)
tuner.search(x, y, validation_split=0.25, epochs=2, class_weight={0: 1.0, 1: 3.0}, verbose=0)
(model,) = tuner.get_best_models()
held_out = {name: values[72:] for name, values in x.items()}
losses = keras.losses.sparse_categorical_crossentropy(y[72:], model.predict(held_out, verbose=0))
measured = float(keras.ops.mean(losses))
score = tuner.oracle.get_best_trials()[0].score
assert abs(measured - score) < 1e-4, f"the best model's loss is {measured}, the trial's was {score}"
