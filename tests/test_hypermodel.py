"""The hypermodel that wraps the user's."""

import copy
import pickle

import keras_tuner
import pytest

from accumtune import AccumulationHyperModel


class Classifier(keras_tuner.HyperModel):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def build(self, hp):
        raise NotImplementedError

    def to_names(self, numbers):
        return [self.classes[number] for number in numbers]


def test_it_has_what_the_users_has():
    """As `tuner.hypermodel` of Keras Tuner's own tuners has."""
    hypermodel = AccumulationHyperModel(Classifier(["cat", "dog"]))
    for one in (hypermodel, copy.deepcopy(hypermodel), pickle.loads(pickle.dumps(hypermodel))):
        assert one.classes == ["cat", "dog"] and one.to_names([1, 0]) == ["dog", "cat"]
        with pytest.raises(AttributeError, match=r"Classifier.* 'names'"):
            _ = one.names
