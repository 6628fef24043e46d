"""The start of a run: its stream of photos, its first state, and the line that describes both."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hashvision.config import Config
from hashvision.data import dataset, removals, stream
from hashvision.errors import UserError
from hashvision.training import program, run
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.progress import say
from hashvision.training.state import State, averaged


def open_stream(
    config: Config, removed: removals.RemovalList
) -> tuple[stream.Stream, removals.Names]:
    """This host's stream of the config's dataset, and the removed names that it leaves out.

    Raises:
      UserError: the dataset or the removal list cannot be used, or hosts have different lists.
    """
    if not config.dataset:
        raise UserError("No dataset is named; set --config.dataset to a folder made by prepare.")
    source = dataset.load(config.dataset)
    names = source.names(removed)
    photos = stream.from_config(
        config, source, host=jax.process_index(), hosts=jax.process_count(), removed=names
    )
    _say_what_matches_nothing(removed, names, photos)
    return photos, names


def first_state(config: Config, built: program.Program, checkpoints: Checkpoints) -> State:
    """The state of the newest checkpoint, or of step 0 (with the trunk of config.init_from)."""
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(built.abstract)
    state = program.initial_state(built, config.seed)
    if not config.init_from:
        return state
    run.read(config.init_from)  # raises if it is not a run
    others = Checkpoints(config.init_from, read_only=True)
    wanted = averaged(built.abstract.params["trunk"], built.abstract.extra)
    _, trunk = others.restore_network(wanted, "trunk")
    others.close()
    params = {**state.params, "trunk": trunk["params"]}
    extra = {**state.extra, "trunk": trunk["trunk"]}
    average = state.average
    if average != ():
        average = averaged(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, extra))
    return state._replace(params=params, extra=extra, average=average)


def headline(config: Config, built: program.Program, photos: stream.Stream, start: int) -> str:
    """The line that says what is trained, on what, and from which step to which."""
    parameters = sum(x.size for x in jax.tree.leaves(built.abstract.params))
    devices = built.mesh.devices
    hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"{config.model.name}, {parameters / 1e6:.1f}M parameters, on {devices.size}"
        f" {devices.flat[0].platform} devices{hosts}; {photos.epoch_length:,.0f}"
        f" photos an epoch; steps {start:,} to {built.total_steps:,}"
    )


def _say_what_matches_nothing(
    removed: removals.RemovalList, names: removals.Names, photos: stream.Stream
) -> None:
    """Prints the lines of the removal list that match nothing on any host.

    Raises:
      UserError: the hosts have different lists; the workdir can record only one.
    """
    matched = names.matched(photos.hits)
    if jax.process_count() > 1:
        lists = multihost_utils.process_allgather(np.frombuffer(names.digest, np.uint8))
        if (lists != lists[0]).any():
            raise UserError(
                "The hosts of this run have different removal lists; give all of them the same"
                " --removals and --keep_copies_of_removed."
            )
        matched = multihost_utils.process_allgather(matched).any(0)
    if removed.lines:
        unmatched = removed.unmatched(names, matched)
        say(removals.describe_unmatched(unmatched, len(removed.lines), photos.dataset.path))
