"""The train step compiled for chips that are not here: what one would hold, and how fast it is."""

import dataclasses
import json
import math
import os
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hashvision.config import Config, derive
from hashvision.data import stream
from hashvision.errors import UserError
from hashvision.planning import flops, hlo
from hashvision.training import program as programs

# XLA's EffortLevel O1: most of a compilation goes into making each fusion fast. O0 takes half of
# that again, and finds up to four times the cycles of a full compilation.
_LITTLE_EFFORT = {"optimization_level": 19}


class DoesNotFit(UserError):
    """A step needs more memory than its devices have."""


class Chip(NamedTuple):
    """Of cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each kind.

    Where the compiler counts each of a chip's two cores as a device, as for v3 and v4, each has
    half of all but the clock.
    """

    memory: int  # GiB
    tflops: float  # at most, in bfloat16
    # Of a core, GHz: what gives that peak with its matrix units of 128x128 (v6e: 256x256).
    clock: float
    interconnect: int  # GB/s to the neighbours together, one way
    lanes: int  # width of its matrix units
    host_cores: dict[int, int]  # virtual ones of a host, by the chips that it has


CHIPS = {
    "v3": Chip(32, 123, 0.94, 400, 128, {4: 96}),
    "v4": Chip(32, 275, 1.05, 300, 128, {4: 240}),
    "v5e": Chip(16, 197, 1.5, 200, 128, {1: 24, 4: 112, 8: 224}),
    "v5p": Chip(95, 459, 1.75, 600, 128, {4: 208}),
    "v6e": Chip(32, 918, 1.75, 448, 256, {1: 44, 4: 180, 8: 180}),
}


class Target(NamedTuple):
    """What a config is planned for.

    Attributes:
      topology: see `devices_of`.
      classes: of the vocabulary.
      photos: of an epoch.
      price_per_chip_hour: in any currency; 0 prices nothing.
      quick: compiles with little effort, in a third of the time: nearly the same memory, and up to
        twice the cycles.
    """

    topology: str
    classes: int
    photos: float
    price_per_chip_hour: float = 0.0
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of a config on a topology. Sizes are bytes on one device, times seconds."""

    model: str
    topology: str
    devices: int
    chips: int
    hosts: int
    batch_size: int
    steps: int
    held: dict[str, int]  # by kind; temporary is the compiler's own figure
    memory: int  # that the device has; 0 where that is not known
    model_flops: float  # of a step on all devices, without what a form of the step adds
    lane_flops: float  # what matrix units have to do for that, padded to their width
    compiled_flops: float  # of a step on one device; a loop's body counts once
    cycles: int  # the compiler's estimate of a step on one device; 0 where it makes none
    collectives: list[hlo.Collective]
    compile_seconds: float
    price_per_chip_hour: float = 0.0
    quick: bool = False  # compiled with little effort: cycles are an upper bound
    text: str = dataclasses.field(default="", repr=False)  # the compiled program's HLO

    @property
    def needed(self) -> int:
        """Bytes that a device needs in all."""
        return sum(self.held.values())

    @property
    def chip(self) -> Chip | None:
        """The kind of chip; None for devices that are no TPUs."""
        return CHIPS.get(self.topology.partition(":")[0])

    @property
    def share(self) -> float:
        """How much of a chip a device is."""
        return self.chips / self.devices

    @property
    def compute_seconds(self) -> float:
        """Of a step, by the compiler's cycles."""
        return self.cycles / (self.chip.clock * 1e9) if self.chip else 0.0

    @property
    def collective_seconds(self) -> float:
        """Of a step, if its collectives used every link fully: their floor."""
        if not self.chip:
            return 0.0
        return sum(each.sent for each in self.collectives) / (
            self.chip.interconnect * 1e9 * self.share
        )

    @property
    def step_seconds(self) -> float:
        """With nothing overlapped."""
        return self.compute_seconds + self.collective_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (PaLM, appendix B) with nothing overlapped."""
        if not (self.chip and self.step_seconds):
            return 0.0
        return self.model_flops / (self.step_seconds * self.chip.tflops * 1e12 * self.chips)

    @property
    def mfu_limit(self) -> float:
        """The most that padding channels to the width of the matrix units leaves."""
        return self.model_flops / self.lane_flops

    @property
    def host_cores(self) -> int:
        """Virtual cores of each host; 0 where that is not known."""
        return self.chip.host_cores.get(self.chips // self.hosts, 0) if self.chip else 0

    @property
    def photos_per_second(self) -> float:
        """That all hosts together must deliver; 0 where no time is estimated."""
        return self.batch_size / self.step_seconds if self.step_seconds else 0.0

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds / 3600

    @property
    def price(self) -> float:
        """Of the whole run."""
        return self.hours * self.chips * self.price_per_chip_hour

    def as_json(self) -> str:
        """All figures, also those that follow from others."""
        values = dataclasses.asdict(self)
        del values["text"]
        values["collectives"] = [{**each._asdict(), "sent": each.sent} for each in self.collectives]
        following = [name for name, each in vars(Plan).items() if isinstance(each, property)]
        for name in following:
            values[name] = getattr(self, name)
        values["chip"] = self.chip and self.chip._asdict()
        return json.dumps(values, indent=2)


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, to compile for.

    Args:
      topology: KIND:SHAPE of TPUs, v5e:16x16 say; cpu:N for N simulated devices (before JAX has
        made any); gpu for those that are here.

    Raises:
      UserError: there is no such topology or no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdecimal() and len(shape) <= 4 and int(shape):
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")
    if topology == "gpu":
        try:
            return jax.devices("gpu")
        except RuntimeError:
            raise UserError("--topology=gpu: JAX finds no GPU here; give a TPU or cpu:N.") from None
    if kind not in CHIPS or not shape:
        raise UserError(
            f"--topology={topology} is none that is known; give KIND:SHAPE, such as v4:4x4x8 or"
            f" v5e:16x16, of {', '.join(CHIPS)}, or cpu:N, or gpu."
        )
    # What libtpu asks for where there is no TPU that would tell it.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # It takes no TPU, so it may plan beside a run that has one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Code is made fusion by fusion, which takes most of the time: on all cores.
    threads = f"--xla_jf_internal_num_threads={os.cpu_count()}"
    parallel = f"{threads} --xla_tpu_impure_hlo_parallel_compile=true"
    os.environ.setdefault("LIBTPU_INIT_ARGS", parallel)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host_bounds(topology)
        ).devices
    except Exception as error:  # libtpu answers with several kinds
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The TPU compiler cannot plan for --topology={topology} ({reason}); install it with"
            " `pip install --require-hashes -r requirements-tpu.txt`, or give a shape that exists."
        ) from None


def host_bounds(topology: str) -> tuple[int, int, int]:
    """The shape of the chips that one host of KIND:SHAPE has, as Cloud TPU makes its machines.

    2x2; but where that is all of the topology, or the eight chips of a v5e:2x4 or v6e:2x4, one
    host has all (cloud.google.com/tpu/docs/v5e and v6e).
    """
    kind, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x") if side.isdecimal()]
    largest = max(CHIPS[kind].host_cores)
    if 0 < math.prod(sides) <= largest and len(sides) <= 3:
        x, y, z = [*sides, 1, 1][:3]
        return x, y, z
    return 2, 2, 1


def chips_of(devices: list[Any]) -> int:
    """How many chips the devices are; of some TPUs each core counts as a device."""
    return len({str(getattr(device, "coords", device.id)) for device in devices})


def memory_of(topology: str, devices: list[Any]) -> int:
    """Bytes that each of a topology's devices has; 0 where that is not known."""
    chip = CHIPS.get(topology.partition(":")[0])
    return chip.memory * 2**30 * chips_of(devices) // len(devices) if chip else 0


def bytes_a_device(tree: Any) -> int:
    """Of the shards that one device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def forward_pass(config: Config, program: programs.Program, classes: int, photos: float) -> Any:
    """The jaxpr of a step's loss, on all devices together.

    Of the network as the paper has it, without the zeros of merged groups, and of crops as they
    are: what it takes to cut them is none of the model's.
    """
    plain = config.copy_and_resolve_references()
    plain.model.group_conv, plain.mesh.fsdp = "native", 1
    objective = programs.build(plain, classes, photos, jax.devices()[:1]).objective
    batch = jax.eval_shape(program.cut, program.abstract_batch)
    arguments = (program.abstract.params, program.abstract.extra, batch)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    step = jax.ShapeDtypeStruct((), "int32")
    return jax.make_jaxpr(objective.loss)(*arguments, jax.random.key(0), step).jaxpr


def plan(config: Config, target: Target) -> Plan:
    """Compiles the step that `train` would run, with its shardings, for a topology.

    Args:
      config: of hashvision/config/schema.py.
      target: what it is planned for.

    Raises:
      UserError: there is no such topology or no compiler for it, or the config does not fit it.
    """
    topology, classes, photos, price_per_chip_hour, quick = target
    config = config.copy_and_resolve_references()
    devices = devices_of(topology)
    hosts = len({device.process_index for device in devices})
    stream.check_lanes(config.batch_size, config.data.lanes, hosts)
    for line in derive.fill(config, photos):
        print(line, flush=True)
    program = programs.build(config, classes, photos, devices)
    start = time.monotonic()
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.abstract, program.abstract_batch)
        try:
            compiled = lowered.compile(_LITTLE_EFFORT if quick else None)
        except jax.errors.JaxRuntimeError as error:
            line = next((x for x in str(error).splitlines() if "Ran out of memory" in x), None)
            if line is None:
                raise
            raise DoesNotFit(
                f"{config.model.name} does not fit {topology}: {line.strip()} More chips, a larger"
                " --config.mesh.fsdp, --config.accumulate, a smaller --config.batch_size or"
                " --config.model.remat='(True, True, True, True)' would need less; --fit searches."
            ) from None
    seconds = time.monotonic() - start
    state = program.abstract
    chip, text = CHIPS.get(topology.partition(":")[0]), compiled.as_text()
    memory, batch = compiled.memory_analysis(), program.abstract_batch
    loss = forward_pass(config, program, classes, photos)
    held = {
        "parameters": bytes_a_device(state.params),
        "optimiser": bytes_a_device(state.opt_state),
        "average": bytes_a_device(state.average),
        "statistics and queue": bytes_a_device(state.extra),
        "batch": bytes_a_device(batch),
    }
    # Layouts are padded, on TPU to tiles of 8x128; results that take no argument's place, the code.
    held["padding and results"] = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + max(memory.generated_code_size_in_bytes, 0)
        - sum(held.values())
    )
    held["temporary"] = memory.temp_size_in_bytes
    return Plan(
        model=config.model.name,
        topology=topology,
        devices=len(devices),
        chips=chips_of(devices),
        hosts=hosts,
        batch_size=config.batch_size,
        steps=program.total_steps,
        held=held,
        memory=memory_of(topology, devices),
        model_flops=3 * flops.forward(loss),  # the backward pass takes twice as many
        lane_flops=3 * flops.forward(loss, chip.lanes if chip else 1),
        compiled_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        cycles=hlo.cycles(text),
        collectives=hlo.collectives(text),
        compile_seconds=seconds,
        price_per_chip_hour=price_per_chip_hour,
        quick=quick,
        text=text,
    )


def table(found: Plan) -> str:
    """A plan as the lines that are printed."""
    lines = [f"{found.model} on {found.topology}: {found.devices} devices, GiB on each", ""]
    rows = {**found.held, "in all": found.needed}
    if found.memory:
        rows["there is"] = found.memory
    lines += [f"{name:<22}{size / 2**30:>8.2f}" for name, size in rows.items()] + [""]
    if found.memory:
        share = found.needed / found.memory
        lines.append(
            f"fits, with {1 - share:.0%} to spare"
            if share <= 1
            else f"does not fit, by {(share - 1) * found.memory / 2**30:.2f} GiB a device"
        )
    effort = " with little effort" if found.quick else ""
    lines.append(f"compiled in {found.compile_seconds:.0f} s{effort}")
    lines += ["", f"{'model FLOPs a step':<22}{found.model_flops:>11.3g}, on all devices"]

    kinds = {each.kind: [0, 0.0] for each in found.collectives}
    for each in found.collectives:
        kinds[each.kind][0] += each.times
        kinds[each.kind][1] += each.sent
    for kind, (count, sent) in kinds.items():
        lines.append(f"{kind:<22}{count:>6} a step, {sent / 2**20:,.1f} MiB sent by a device")
    if not (found.cycles and found.chip):
        lines.append("This compiler estimates no cycles: no step time, no price.")
        return "\n".join(lines)
    rate, hosts = found.photos_per_second, found.hosts
    lines += [
        "",
        "Estimated, from the compiler's cycles of each fusion, one after the other, at"
        f" {found.chip.clock} GHz,",
        "and collectives at the speed of all links, nothing overlapped. Left out: waiting for",
        "copies in memory, for slower chips and for the host.",
        *(["Without --quick up to half the cycles, and some percent more memory."] * found.quick),
        f"{'cycles a step':<22}{found.cycles / 1e6:>10.1f} million on a device",
        f"{'step':<22}{found.step_seconds:>10.4f} s: {found.compute_seconds:.4f} of computation,"
        f" {found.collective_seconds:.4f} of collectives",
        f"{'MFU':<22}{found.mfu:>10.1%} of {found.chip.tflops * found.chips / 1000:,.1f} PFLOP/s;"
        f" {found.mfu_limit:.1%} if matrix units of {found.chip.lanes} lanes never waited",
        f"{'photos':<22}{rate:>10,.0f} a second, {rate / hosts:,.0f} from each of {hosts} hosts",
        f"{'run':<22}{found.hours:>10,.1f} hours of {found.steps:,} steps",
    ]
    if found.price_per_chip_hour:
        each = found.price_per_chip_hour
        lines.append(f"{'price':<22}{found.price:>10,.0f} at {each} a chip and hour")
    return "\n".join(lines)
