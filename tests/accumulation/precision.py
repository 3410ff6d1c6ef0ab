"""The dtype that Keras computes in, set for a test."""


def set_precision(dtype):
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def let_keras_compute_in_float64(set_item):
    """Switches off a rule of Keras on JAX and torch: promoting dtypes turns float64 into float32.

    With the rule, a float64 model adds, divides, averages and normalizes in float32, and sums over a batch (a bias's
    gradient, a mean) depend on how they are grouped: both sides of a comparison are only exact to 1e-7.
    `test_float64_as_keras_has_it` keeps the rule.
    """
    from keras.src.backend.common import dtypes

    set_item(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
