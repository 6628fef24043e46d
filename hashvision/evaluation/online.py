"""Label-free learning watched by labels: kNN on a folder of photos while a run goes on."""

import jax
import numpy as np

from hashvision.evaluation import datasets, features, knn
from hashvision.evaluation.encoder import BATCH_SIZE
from hashvision.evaluation.protocols import NEIGHBOURS, TEMPERATURE
from hashvision.training.loop import Predict


class NearestNeighbours:
    """A check for `training.loop`: top-1 of weighted kNN on a labelled set's test photos."""

    def __init__(self, path: str) -> None:
        """Reads the dataset's labels, not yet its photos.

        Args:
          path: of what `datasets.read` reads.

        Raises:
          UserError: it is no dataset of one label a photo.
        """
        dataset = datasets.read(path)
        self._name, self._split = dataset.name, datasets.single_label(dataset)

    def __call__(self, predict: Predict, resolution: int, step: int) -> dict[str, float]:
        """{"knn_NAME": fraction of the readable test photos that are named right}."""
        devices = jax.device_count()
        size = -(-BATCH_SIZE // devices) * devices
        encoder = features.Encoder(predict, resolution, step, {}, size)
        train = features.features(encoder, self._split.train)
        test = features.features(encoder, self._split.test)
        labels = self._split.train_labels[train.readable]
        wanted = self._split.test_labels[test.readable]
        predicted = knn.predict(
            train.values, labels, test.values, len(self._split.classes), NEIGHBOURS, TEMPERATURE
        )
        return {f"knn_{self._name}": float(np.mean(predicted == wanted))}
