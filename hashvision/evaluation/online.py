"""Label-free learning watched by labels: kNN on a folder of photos while a run goes on."""

import numpy as np

from hashvision.data import removals
from hashvision.evaluation import datasets, features, knn
from hashvision.evaluation.encoder import batch_size
from hashvision.evaluation.protocols import NEIGHBOURS, TEMPERATURE
from hashvision.training.loop import Predict


class NearestNeighbours:
    """A check for `training.loop`: top-1 of weighted kNN on a labelled set's test photos."""

    def __init__(self, path: str, removed: removals.RemovalList = removals.NO_LIST) -> None:
        """Reads the dataset's labels, and its photos only where they tell which are removed.

        Args:
          path: of what `datasets.read` reads.
          removed: photos that are left out.

        Raises:
          UserError: it is no dataset of one label a photo, or all of a part are removed.
        """
        dataset = datasets.read(path, removed)
        self._name, self._split = dataset.name, datasets.single_label(dataset)

    def __call__(self, predict: Predict, resolution: int, step: int) -> dict[str, float]:
        """{"knn_NAME": fraction of the readable test photos that are named right}."""
        encoder = features.Encoder(predict, resolution, step, {}, batch_size())
        train = features.encode(encoder, self._split.train)
        test = features.encode(encoder, self._split.test)
        labels = self._split.train_labels[train.readable]
        wanted = self._split.test_labels[test.readable]
        predicted = knn.predict(
            train.features, labels, test.features, len(self._split.classes), NEIGHBOURS, TEMPERATURE
        )
        return {f"knn_{self._name}": float(np.mean(predicted == wanted))}
