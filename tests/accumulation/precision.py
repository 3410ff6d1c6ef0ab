"""The dtype that Keras computes in, set for a test."""


def set_precision(dtype):
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def let_keras_compute_in_float64(set_item):
    """Lifts a rule of Keras on JAX and torch: where dtypes are promoted, float64 becomes float32.

    With it, a model of float64 adds, divides, averages and normalizes in float32, and sums of a batch (a bias's
    gradient, a mean) depend on how they are grouped: plain Keras has no more than 1e-7 then, on either side of a
    comparison. `test_float64_as_keras_has_it` leaves the rule as it is.
    """
    from keras.src.backend.common import dtypes

    set_item(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
