"""Saves and restores the training state; the only file that imports Orbax.

Each checkpoint holds fingerprints of its arrays, computed on the devices before the save. Restored
arrays must have the same fingerprints, so that damage on the way to disk and back is detected.
"""

import contextlib
import functools
import importlib
import math
import operator
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hashvision import storage
from hashvision.errors import UserError
from hashvision.training import run
from hashvision.training.state import State, averaged

Tree = dict[str, Any]
TreePath = tuple[str, ...]  # keys from the root of a tree


# The folders of a checkpoint.
_STATE = "default"
_FINGERPRINTS = "fingerprints"


class Checkpoints:
    """The checkpoints of a workdir; the newest few and the best one are kept."""

    def __init__(
        self, workdir: str, *, keep: int = 3, best: str = "loss", read_only: bool = False
    ) -> None:
        """Opens WORKDIR/checkpoints, or makes it.

        Args:
          workdir: of the run.
          keep: number of newest checkpoints to keep.
          best: the metric whose lowest value marks the best checkpoint, which is kept as well.
          read_only: only restore, and leave files alone that a running run is writing.
        """
        self._workdir = storage.absolute(workdir)
        self.path = os.path.join(self._workdir, "checkpoints")
        self._damaged = os.path.join(self._workdir, "damaged")
        self._read_only = read_only
        if storage.is_remote(self.path):
            _assume_flat_namespace()
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
        if read_only:  # Orbax would warn that a read-only manager cannot save
            logging.set_verbosity(logging.ERROR)
        try:
            self._manager = ocp.CheckpointManager(
                self.path,
                item_handlers={
                    _STATE: ocp.StandardCheckpointHandler(),
                    _FINGERPRINTS: ocp.JsonCheckpointHandler(),
                },
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
        """Copies the state off the devices before it returns, and writes it in the background.

        Raises:
          UserError: this checkpoint or the one before cannot be written.
        """
        found = {name: int(value) for name, value in _fingerprints(_leaves(state)).items()}
        arguments = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _FINGERPRINTS: ocp.args.JsonSave(found)}
        )
        with self._writing():
            self._manager.save(step, args=arguments, metrics=metrics)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() > 1 and not _is_storage_error(error):
                raise  # a lost host raises here too
            # Orbax's own list would wait for the other hosts, which are at their next step.
            steps = run.checkpoints(self._workdir)
            last = f"the last complete one is of step {steps[-1]:,}" if steps else "there is none"
            raise UserError(
                f"A checkpoint cannot be written to {self.path} ({_cause(error)}; {last}); free"
                " space there or allow writing to the folder, and run the same command again."
            ) from error

    def _steps(self) -> list[int]:
        """The steps of the checkpoints on disk, newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, abstract: State) -> State:
        """Reads the newest state onto the shardings of `abstract`, whatever mesh wrote it.

        If a checkpoint is damaged, a line names it, it is moved to WORKDIR/damaged (unless read
        only), and the one before it is read.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          UserError: there is no checkpoint, or its arrays have other names or shapes.
        """
        return self._read_newest(lambda step: self._restore_state(abstract, step))

    def _read_newest(self, read: Callable[[int], Any]) -> typing.Any:
        """Calls `read` with each step, newest first, until one can be read; returns its result."""
        self.wait()  # a checkpoint has its final name as soon as its save starts
        steps = self._steps()
        for step in steps:
            error = None
            try:
                found = read(step)
            except UserError:
                raise
            except Exception as whatever:  # damaged files raise errors of many types
                error, found = whatever, None
            if _all_hosts(error is None):
                return found
            self._set_aside(step, _cause(error) if error else "another host cannot read it")
        left = "only damaged checkpoints; train into a new --workdir."
        none = "no checkpoint; train first with `python -m hashvision train`."
        raise UserError(f"{self.path} holds {left if steps else none}")

    def _restore_state(self, abstract: State, step: int) -> State:
        found = self._metadata(step)
        old = _has_former_names(found)
        if old:
            abstract = _rename(abstract, _FORMER)
        without_statistics = abstract.average != () and _lacks_statistics(found["average"])
        if without_statistics:
            abstract = abstract._replace(average=abstract.average["params"])
        _check(found, abstract, os.path.join(self.path, str(step)))
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        restored = typing.cast(State, self._manager.restore(step, args=arguments)[_STATE])
        self._verify(step, restored)
        if old:
            restored = _rename(restored, {former: name for name, former in _FORMER.items()})
        if without_statistics:  # such an average was evaluated with the last step's statistics
            extra = jax.tree.map(jnp.copy, restored.extra)
            restored = restored._replace(average=averaged(restored.average, extra))
        return restored

    def _metadata(self, step: int) -> Any:
        """Shapes and dtypes of a saved state."""
        return self._manager.item_metadata(step)[_STATE].tree

    def _verify(self, step: int, restored: Any) -> None:
        """Raises ValueError if a restored array is not the one that was saved under its name."""
        if not storage.is_folder(os.path.join(self.path, str(step), _FINGERPRINTS)):
            return  # an earlier version, without fingerprints, wrote it
        arguments = ocp.args.Composite(**{_FINGERPRINTS: ocp.args.JsonRestore()})
        saved = self._manager.restore(step, args=arguments)[_FINGERPRINTS]
        for name, value in _fingerprints(_leaves(restored)).items():
            if int(value) != saved[name]:
                raise ValueError(f"{name} is not what was saved")

    def _set_aside(self, step: int, cause: str) -> None:
        """Moves a damaged checkpoint away, unless read only, and prints a line."""
        where = "left where it is"
        if not self._read_only:
            where = f"moved to {self._damaged}"
            if jax.process_index() == 0:
                storage.make_folder(self._damaged)
                name = f"{step}.{len(storage.names(self._damaged))}"
                moved = os.path.join(self._damaged, name)
                storage.move(os.path.join(self.path, str(step)), moved)
            _all_hosts(True)
            self._manager.reload()  # else the manager would think that the step is saved
        if jax.process_index() == 0:
            print(f"The checkpoint of step {step:,} is damaged, {where} ({cause}).", flush=True)

    def restore_network(self, abstract: Tree, *part: str) -> tuple[int, Tree]:
        """Reads only the arrays of the newest state that evaluation needs.

        Args:
          abstract: shapes, dtypes and shardings of {"params", "trunk"}, as state.averaged has them.
          part: keys of a part of the parameters: "trunk" for the trunk alone.

        Returns:
          The step and the arrays: those of the moving average if there is one.

        Raises:
          UserError: there is no checkpoint, or it is of another network.
        """
        return self._read_newest(lambda step: (step, self._restore_part(abstract, part, step)))

    def _restore_part(self, abstract: Tree, part: TreePath, step: int) -> Tree:
        found = self._metadata(step)
        params, statistics = _paths_to_evaluate(found)
        paths = {"params": (*params, *part), "trunk": statistics}

        def taken(tree: Tree) -> Tree:
            return {
                name: functools.reduce(operator.getitem, path, tree) for name, path in paths.items()
            }

        _check(taken(found), abstract, os.path.join(self.path, str(step)))
        wanted: Tree = {}
        for name, (*groups, last) in paths.items():
            group = functools.reduce(lambda tree, key: tree.setdefault(key, {}), groups, wanted)
            group[last] = abstract[name]
        # The manager can only restore the whole state.
        arguments = ocp.args.PyTreeRestore(
            wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = os.path.join(self.path, str(step), _STATE)
            restored = checkpointer.restore(path, args=arguments)
        self._verify(step, restored)
        return taken(restored)

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          UserError: a checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves in progress and closes the manager."""
        self._manager.close()


# Names of statistics in checkpoints of earlier versions.
_FORMER = {"trunk": "batch_stats", "head": "head_stats"}


def _has_former_names(found: Tree) -> bool:
    """Whether a checkpoint has its statistics under their former names."""
    return _FORMER["trunk"] in found["extra"]


def _rename(state: State, names: Mapping[str, str]) -> State:
    """Renames members of `extra` and `average`."""

    def renamed(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {names.get(name, name): value for name, value in tree.items()}

    average = state.average
    if isinstance(average, dict) and {"params"} < average.keys():
        average = renamed(average)
    return state._replace(extra=renamed(state.extra), average=average)


def _paths_to_evaluate(found: Tree) -> tuple[TreePath, TreePath]:
    """The paths of the parameters and statistics that state.evaluated would return."""
    statistics = _FORMER["trunk"] if _has_former_names(found) else "trunk"
    if not found["average"]:
        return ("params",), ("extra", statistics)
    if _lacks_statistics(found["average"]):
        return ("average",), ("extra", statistics)
    return ("average", "params"), ("average", statistics)


def _lacks_statistics(average: Any) -> bool:
    """Whether a moving average is of an earlier version, which averaged parameters only."""
    return bool(average) and not {"params"} < average.keys()


def _assume_flat_namespace() -> None:
    """Makes Orbax treat every bucket as one without a hierarchical namespace, which always works.

    To find out, it would need the package google-cloud-storage, which nothing else here needs.
    """
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError:
        gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


def _all_hosts(true: bool) -> bool:
    """Whether a condition holds on all hosts; waits for all of them."""
    if jax.process_count() == 1:
        return true
    return bool(np.all(multihost_utils.process_allgather(np.array(true))))


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of each array's bits times 2 i + 1, modulo 2^32, i being the element's flat index.

    Integer addition is exact in any order, so the result does not depend on the mesh, and no array
    moves between devices.
    """
    return {name: _fingerprint(x) for name, x in leaves.items()}


@jax.jit  # traced once for all arrays of a shape
def _fingerprint(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(x.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _is_storage_error(error: Exception) -> bool:
    return isinstance(error, OSError) or "writing" in str(error)  # TensorStore's "Error writing"


def _cause(error: Exception) -> str:
    """The first line of an error, without the settings that TensorStore and Orbax append."""
    return str(error).split("\n")[0].split(" [tensorstore_spec")[0].split(" See full")[0][:300]


def _leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name."""

    def name(path: tuple[Any, ...]) -> str:
        return "/".join(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
        )

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree).items()}


def _check(found: Any, abstract: Any, path: str) -> None:
    """Raises UserError for the first array whose shape differs; Orbax's message is a page long."""
    saved, wanted = _shapes(found), _shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"The checkpoint {path} does not fit this config: {name} is"
                f" {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; use the"
                " config it was trained with, or another --workdir."
            )
