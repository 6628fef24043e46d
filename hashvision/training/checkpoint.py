"""Saving and restoring the training state; the only place that imports Orbax.

Beside each state lie fingerprints of its arrays, computed where the arrays are. What is restored
must have them again, so that no damage on the way to disk and back passes for a state.
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
Place = tuple[str, ...]  # keys, from a tree's root on


# The folders of a checkpoint.
_STATE = "default"
_FINGERPRINTS = "fingerprints"


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
        self._workdir = storage.absolute(workdir)
        self.path = os.path.join(self._workdir, "checkpoints")
        self._damaged = os.path.join(self._workdir, "damaged")
        self._read_only = read_only
        if storage.is_remote(self.path):
            _treat_buckets_as_flat()
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
        """Copies the state off the devices and writes it in the background.

        Raises:
          UserError: this one, or the one before, cannot be written.
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
            if jax.process_count() > 1 and not _is_of_storage(error):
                raise  # a host that is lost shows here too
            # Not asked of Orbax, which would wait for hosts that are at their next step.
            steps = run.checkpoints(self._workdir)
            last = f"that of step {steps[-1]:,} is the last whole one" if steps else "none is there"
            raise UserError(
                f"A checkpoint cannot be written to {self.path} ({_cause(error)}); {last}: see that"
                " there is space and that the folder may be written, and the same command goes on."
            ) from error

    def _steps(self) -> list[int]:
        """The steps on disk, newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, abstract: State) -> State:
        """Reads the newest state, onto the shardings of `abstract` whatever mesh wrote it.

        A checkpoint that is damaged is named, moved to WORKDIR/damaged (unless read only), and the
        one before it read.

        Args:
          abstract: shapes, dtypes and shardings.

        Raises:
          UserError: there is none, or its arrays have other names or shapes.
        """
        return self._newest(lambda step: self._restored(abstract, step))

    def _newest(self, read: Callable[[int], Any]) -> typing.Any:
        """What `read` makes of the newest step that it finds whole."""
        self.wait()  # a checkpoint has its name from the moment its save begins
        steps = self._steps()
        for step in steps:
            error = None
            try:
                found = read(step)
            except UserError:
                raise
            except Exception as whatever:  # storage raises what it likes on broken bytes
                error, found = whatever, None
            if _all_hosts(error is None):
                return found
            self._pass_over(step, _cause(error) if error else "another host cannot read it")
        left = "only damaged checkpoints; train into a new --workdir."
        none = "no checkpoint; train first with `python -m hashvision train`."
        raise UserError(f"{self.path} holds {left if steps else none}")

    def _restored(self, abstract: State, step: int) -> State:
        found = self._metadata(step)
        old = _is_former(found)
        if old:
            abstract = _renamed(abstract, _FORMER)
        alone = abstract.average != () and _is_of_parameters_alone(found["average"])
        if alone:  # its parameters were evaluated with the statistics of the last step
            abstract = abstract._replace(average=abstract.average["params"])
        _check(found, abstract, os.path.join(self.path, str(step)))
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        restored = typing.cast(State, self._manager.restore(step, args=arguments)[_STATE])
        self._verify(step, restored)
        if old:
            restored = _renamed(restored, {former: name for name, former in _FORMER.items()})
        if alone:
            extra = jax.tree.map(jnp.copy, restored.extra)
            restored = restored._replace(average=averaged(restored.average, extra))
        return restored

    def _metadata(self, step: int) -> Any:
        """Shapes and dtypes of what was saved."""
        return self._manager.item_metadata(step)[_STATE].tree

    def _verify(self, step: int, restored: Any) -> None:
        """Sees that arrays are those that were saved, by their names in the state."""
        if not storage.is_folder(os.path.join(self.path, str(step), _FINGERPRINTS)):
            return  # written before there were any
        arguments = ocp.args.Composite(**{_FINGERPRINTS: ocp.args.JsonRestore()})
        saved = self._manager.restore(step, args=arguments)[_FINGERPRINTS]
        for name, value in _fingerprints(_leaves(restored)).items():
            if int(value) != saved[name]:
                raise ValueError(f"{name} is not what was saved")

    def _pass_over(self, step: int, cause: str) -> None:
        where = "left where it is"
        if not self._read_only:
            where = f"moved to {self._damaged}"
            if jax.process_index() == 0:
                storage.make_folder(self._damaged)
                name = f"{step}.{len(storage.names(self._damaged))}"
                moved = os.path.join(self._damaged, name)
                storage.move(os.path.join(self.path, str(step)), moved)
            _all_hosts(True)
            self._manager.reload()  # or it would take the step for saved
        if jax.process_index() == 0:
            print(f"The checkpoint of step {step:,} is damaged, {where} ({cause}).", flush=True)

    def restore_network(self, abstract: Tree, *part: str) -> tuple[int, Tree]:
        """Reads what is to be evaluated of the newest whole state, and nothing else.

        Args:
          abstract: as state.averaged has it, {"params", "trunk"}: shapes, dtypes and shardings.
          part: of the parameters: "trunk" for the network alone, whatever objective trained it.

        Returns:
          The step, and the arrays: the moving average's where there is one.

        Raises:
          UserError: there is no checkpoint, or it is of another network.
        """
        return self._newest(lambda step: (step, self._restored_network(abstract, part, step)))

    def _restored_network(self, abstract: Tree, part: Place, step: int) -> Tree:
        found = self._metadata(step)
        params, statistics = _evaluated(found)
        places = {"params": (*params, *part), "trunk": statistics}

        def taken(tree: Tree) -> Tree:
            return {
                name: functools.reduce(operator.getitem, place, tree)
                for name, place in places.items()
            }

        _check(taken(found), abstract, os.path.join(self.path, str(step)))
        wanted: Tree = {}
        for name, (*groups, last) in places.items():
            group = functools.reduce(lambda tree, key: tree.setdefault(key, {}), groups, wanted)
            group[last] = abstract[name]
        # All else is left where it lies; the manager would want the whole state.
        arguments = ocp.args.PyTreeRestore(
            wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = os.path.join(self.path, str(step), _STATE)
            restored = checkpointer.restore(path, args=arguments)
        self._verify(step, restored)
        return taken(restored)

    def wait(self) -> None:
        """Returns when all saves are on disk.

        Raises:
          UserError: one cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


# Names that statistics had in earlier checkpoints.
_FORMER = {"trunk": "batch_stats", "head": "head_stats"}


def _is_former(found: Tree) -> bool:
    """Whether a checkpoint has its statistics by their former names."""
    return _FORMER["trunk"] in found["extra"]


def _renamed(state: State, names: Mapping[str, str]) -> State:
    """The state with members of `extra` and `average` called otherwise."""

    def renamed(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {names.get(name, name): value for name, value in tree.items()}

    average = state.average
    if isinstance(average, dict) and {"params"} < average.keys():
        average = renamed(average)
    return state._replace(extra=renamed(state.extra), average=average)


def _evaluated(found: Tree) -> tuple[Place, Place]:
    """Where a checkpoint has the parameters and statistics that state.evaluated would return."""
    statistics = _FORMER["trunk"] if _is_former(found) else "trunk"
    if not found["average"]:
        return ("params",), ("extra", statistics)
    if _is_of_parameters_alone(found["average"]):
        return ("average",), ("extra", statistics)
    return ("average", "params"), ("average", statistics)


def _is_of_parameters_alone(average: Any) -> bool:
    """Whether a moving average was saved before it held the trunk's statistics too."""
    return bool(average) and not {"params"} < average.keys()


def _treat_buckets_as_flat() -> None:
    """Lets Orbax take all buckets for flat, which a hierarchical one can pass for.

    It would ask by the package google-cloud-storage, which nothing else here needs.
    """
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError:
        gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


def _all_hosts(true: bool) -> bool:
    """Whether it is true on all hosts; they wait for each other."""
    if jax.process_count() == 1:
        return true
    return bool(np.all(multihost_utils.process_allgather(np.array(true))))


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """For each array the sum, modulo 2^32, of its bits times odd numbers that differ by place.

    Adding is exact whatever the order, so every mesh finds the same numbers, and no array is moved
    between devices for it.
    """

    def fingerprint(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            stride = math.prod(x.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        return jnp.sum(x.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return {name: fingerprint(x) for name, x in leaves.items()}


def _is_of_storage(error: Exception) -> bool:
    return isinstance(error, OSError) or "writing" in str(error)  # TensorStore's "Error writing"


def _cause(error: Exception) -> str:
    """The first line of an error, without the pages of settings that follow in the same."""
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
    """Says in one sentence what does not fit, where Orbax would raise a page."""
    there, wanted = _shapes(found), _shapes(abstract)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"The checkpoint {path} does not fit this config: {name} is"
                f" {there.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; use the"
                " config it was trained with, or another --workdir."
            )
