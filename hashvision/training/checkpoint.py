"""Saving and restoring the training state; the only place that imports Orbax."""

import os
import typing
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hashvision.errors import UserError

State = typing.TypeVar("State")
Tree = dict[str, Any]


_ITEM = "default"  # the folder in which Orbax's manager puts a state that it gives no name


class Checkpoints:
    """The checkpoints of a workdir: saved asynchronously, the newest few and the best kept."""

    def __init__(
        self, workdir: str, keep: int = 3, best: str = "loss", read_only: bool = False
    ) -> None:
        """Opens or makes WORKDIR/checkpoints.

        Args:
          workdir: of the run.
          keep: how many of the newest to keep.
          best: the metric whose lowest value marks the checkpoint that is kept besides.
          read_only: only restore; leaves alone what a run beside this one is writing.
        """
        self.path = os.path.abspath(os.path.join(workdir, "checkpoints"))
        policies = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        verbosity = logging.get_verbosity()
        if read_only:  # Orbax would warn that what is opened so cannot be written
            logging.set_verbosity(logging.ERROR)
        try:
            self._manager = ocp.CheckpointManager(
                self.path,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
            )
        finally:
            logging.set_verbosity(verbosity)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Copies the state off the devices and writes it in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def restore(self, abstract: State, step: int | None = None) -> State:
        """Reads a state, onto the shardings of `abstract` whatever mesh wrote it.

        Args:
          abstract: shapes, dtypes and shardings.
          step: the newest if None.

        Raises:
          UserError: there is none, or its arrays have other names or shapes.
        """
        self.wait()  # `latest_step` names a checkpoint from the moment its save begins
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(
                f"{self.path} holds no checkpoint; train first with `python -m hashvision train`."
            )
        found = self._manager.item_metadata(step)
        _check(found, abstract, os.path.join(self.path, str(step)))
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return typing.cast(State, restored)

    def restore_trunk(self, abstract: Tree) -> Tree:
        """Reads the network alone, of the newest state, whatever objective trained it.

        Args:
          abstract: {"params", "batch_stats"} of a trunk: shapes, dtypes and shardings.

        Raises:
          UserError: there is no checkpoint, or its trunk is another network.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self.path} holds no checkpoint to start from; train it first.")
        found = self._manager.item_metadata(step).tree
        params = found["average"] or found["params"]
        there = {"params": params["trunk"], "batch_stats": found["extra"]["batch_stats"]}
        _check(there, abstract, os.path.join(self.path, str(step)))
        name = "average" if found["average"] else "params"
        wanted = {
            name: {"trunk": abstract["params"]},
            "extra": {"batch_stats": abstract["batch_stats"]},
        }
        # All else is left where it lies; the manager would want the whole state.
        arguments = ocp.args.PyTreeRestore(
            wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = os.path.join(self.path, str(step), _ITEM)
            restored = checkpointer.restore(path, args=arguments)
        return {"params": restored[name]["trunk"], "batch_stats": restored["extra"]["batch_stats"]}

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def name(path: tuple[Any, ...]) -> str:
        return "/".join(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
        )

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _check(found: Any, abstract: Any, path: str) -> None:
    """Says in one sentence what does not fit, where Orbax would raise a page."""
    there, wanted = _shapes(found), _shapes(abstract)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"The checkpoint {path} does not fit this config: {name} is"
                f" {there.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; use the"
                " config it was trained with, or another --workdir."
            )
