"""What a run needs on a TPU topology that is not here: memory, time and price.

`plan` compiles the step that `train` would run, with its shardings, and reads the figures from the
compiled program. `table` prints them.
"""

import dataclasses
import json
import math
import os
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hashvision import objectives
from hashvision.config import Config
from hashvision.data import stream
from hashvision.errors import UserError
from hashvision.planning import flops, hlo
from hashvision.training.program import Program, build

# XLA's EffortLevel O1 skips most of the work of making each fusion fast, which is most of a
# compilation. O0 takes half the time of O1, but reports up to four times the cycles of a full
# compilation.
_LITTLE_EFFORT = {"optimization_level": 19}


class DoesNotFit(UserError):
    """The step needs more memory than a device of the topology has."""


class Chip(NamedTuple):
    """A kind of TPU chip.

    Figures are from cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each kind.
    For v3 and v4 the compiler counts each of the two cores of a chip as a device. Such a device has
    half of every figure except the clock.

    Attributes:
      memory: GiB.
      tflops: peak in bfloat16, TFLOP/s.
      clock: GHz; at this clock the matrix units of 128x128 (v6e: 256x256) reach the peak.
      interconnect: GB/s to all neighbours together, one way.
      lanes: width of a matrix unit.
      host_cores: virtual cores of a host, by its number of chips.
    """

    memory: int
    tflops: float
    clock: float
    interconnect: int
    lanes: int
    host_cores: dict[int, int]


CHIPS = {
    "v3": Chip(memory=32, tflops=123, clock=0.94, interconnect=400, lanes=128, host_cores={4: 96}),
    "v4": Chip(memory=32, tflops=275, clock=1.05, interconnect=300, lanes=128, host_cores={4: 240}),
    "v5e": Chip(
        memory=16,
        tflops=197,
        clock=1.5,
        interconnect=200,
        lanes=128,
        host_cores={1: 24, 4: 112, 8: 224},
    ),
    "v5p": Chip(
        memory=95, tflops=459, clock=1.75, interconnect=600, lanes=128, host_cores={4: 208}
    ),
    "v6e": Chip(
        memory=32,
        tflops=918,
        clock=1.75,
        interconnect=448,
        lanes=256,
        host_cores={1: 44, 4: 180, 8: 180},
    ),
}


class Target(NamedTuple):
    """The topology, the dataset and the price that a plan assumes.

    Attributes:
      topology: as `devices_of` takes it.
      classes: number of classes in the vocabulary.
      photos: number of photos in an epoch.
      price_per_chip_hour: in any currency; 0 means that the plan has no price.
      quick: compile with little effort. This takes a third of the time or less, and finds nearly
        the same memory and up to twice the cycles.
    """

    topology: str
    classes: int
    photos: float
    price_per_chip_hour: float = 0.0
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The figures of a run on a topology. Sizes are bytes on one device; times are seconds.

    Attributes:
      model: name of the network.
      topology: as `devices_of` takes it.
      devices: number of devices; on v3 and v4 a chip has two.
      chips: number of chips.
      hosts: number of hosts.
      batch_size: photos per step, on all devices together.
      steps: steps of the whole run.
      held: bytes on one device by purpose; `temporary` is the compiler's own figure.
      memory: bytes that one device has; 0 if unknown.
      model_flops: FLOPs per step on all devices, counted for the network as published.
      lane_flops: the same with channels padded to the width of the matrix units.
      compiled_flops: the compiler's FLOPs per step on one device; it counts a loop's body once.
      cycles: the compiler's estimate of a step on one device; 0 if the compiler makes none.
      collectives: the collectives of a step.
      compile_seconds: how long the compilation took.
      price_per_chip_hour: in any currency; 0 means that the plan has no price.
      quick: whether the step was compiled with little effort; `cycles` is then an upper bound.
      text: the HLO of the compiled program; not part of `as_json`.
    """

    model: str
    topology: str
    devices: int
    chips: int
    hosts: int
    batch_size: int
    steps: int
    held: dict[str, int]
    memory: int
    model_flops: float
    lane_flops: float
    compiled_flops: float
    cycles: int
    collectives: list[hlo.Collective]
    compile_seconds: float
    price_per_chip_hour: float = 0.0
    quick: bool = False
    text: str = dataclasses.field(default="", repr=False)

    @property
    def needed(self) -> int:
        """Bytes that one device needs in total."""
        return sum(self.held.values())

    @property
    def chip(self) -> Chip | None:
        """The kind of chip; None if the topology is not a TPU."""
        return CHIPS.get(self.topology.partition(":")[0])

    @property
    def share(self) -> float:
        """The fraction of a chip that one device is: 1, or 1/2 on v3 and v4."""
        return self.chips / self.devices

    @property
    def compute_seconds(self) -> float:
        """Seconds of computation per step, from the compiler's cycles; 0 for other than TPUs."""
        return self.cycles / (self.chip.clock * 1e9) if self.chip else 0.0

    @property
    def collective_seconds(self) -> float:
        """Lower bound on the seconds of collectives per step: every link is used fully."""
        if not self.chip:
            return 0.0
        return sum(each.sent for each in self.collectives) / (
            self.chip.interconnect * 1e9 * self.share
        )

    @property
    def step_seconds(self) -> float:
        """Seconds per step if computation and collectives do not overlap."""
        return self.compute_seconds + self.collective_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation in [0, 1] (PaLM, appendix B) for `step_seconds`; 0 if unknown."""
        if not (self.chip and self.step_seconds):
            return 0.0
        return self.model_flops / (self.step_seconds * self.chip.tflops * 1e12 * self.chips)

    @property
    def mfu_limit(self) -> float:
        """Upper bound on `mfu`, in (0, 1], that padding to the width of the matrix units leaves."""
        return self.model_flops / self.lane_flops

    @property
    def host_cores(self) -> int:
        """Virtual cores per host; 0 if unknown."""
        return self.chip.host_cores.get(self.chips // self.hosts, 0) if self.chip else 0

    @property
    def photos_per_second(self) -> float:
        """Photos per second that all hosts together must deliver; 0 if the time is unknown."""
        return self.batch_size / self.step_seconds if self.step_seconds else 0.0

    @property
    def hours(self) -> float:
        """Hours of the whole run; 0 if the time is unknown."""
        return self.steps * self.step_seconds / 3600

    @property
    def price(self) -> float:
        """Price of the whole run, in the currency of `price_per_chip_hour`."""
        return self.hours * self.chips * self.price_per_chip_hour

    def as_json(self) -> str:
        """The JSON text of all fields and properties, without the HLO."""
        values = dataclasses.asdict(self)
        del values["text"]
        values["collectives"] = [{**each._asdict(), "sent": each.sent} for each in self.collectives]
        properties = [name for name, each in vars(Plan).items() if isinstance(each, property)]
        for name in properties:
            values[name] = getattr(self, name)
        values["chip"] = self.chip and self.chip._asdict()
        return json.dumps(values, indent=2)


def plan(config: Config, target: Target) -> Plan:
    """Compiles the step that `train` would run, with its shardings, for a topology.

    Prints the settings that follow from others.

    Args:
      config: keys as in hashvision/config/schema.py; it stays unchanged.
      target: the topology, the dataset and the price.

    Raises:
      DoesNotFit: the step needs more memory than a device has.
      UserError: the topology does not exist, its compiler is not installed, or a setting does not
        suit it.
    """
    topology, classes, photos, price_per_chip_hour, quick = target
    config = config.copy_and_resolve_references()
    devices = devices_of(topology)
    hosts = len({device.process_index for device in devices})
    stream.check_lanes(config.batch_size, config.data.lanes, hosts)
    for line in objectives.fill(config, photos):
        print(line, flush=True)
    program = build(config=config, classes=classes, epoch_length=photos, devices=devices)
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
                f"{config.model.name} does not fit --topology={topology} ({line.strip()}); give"
                " more chips, a larger --config.mesh.fsdp, a larger --config.accumulate, a smaller"
                " --config.batch_size or --config.model.remat='(True, True, True, True)'; --fit"
                " finds settings that fit."
            ) from None
    seconds = time.monotonic() - start
    state = program.abstract
    chip, text = CHIPS.get(topology.partition(":")[0]), compiled.as_text()
    memory, batch = compiled.memory_analysis(), program.abstract_batch
    loss = forward_pass(config=config, program=program, classes=classes, photos=photos)
    held = {
        "parameters": bytes_per_device(state.params),
        "optimiser": bytes_per_device(state.opt_state),
        "average": bytes_per_device(state.average),
        "statistics and queue": bytes_per_device(state.extra),
        "batch": bytes_per_device(batch),
    }
    # What is left of the program's own figures: padding of layouts (on TPU to tiles of 8x128),
    # results that do not reuse an argument's memory, and the code.
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
        model_flops=3 * flops.forward(loss),  # the backward pass takes twice the forward pass
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
    """A plan as the text that the command prints."""
    lines = [f"{found.model} on {found.topology}: {found.devices} devices, GiB on each", ""]
    rows = {**found.held, "total": found.needed}
    if found.memory:
        rows["available"] = found.memory
    lines += [f"{name:<22}{size / 2**30:>8.2f}" for name, size in rows.items()] + [""]
    if found.memory:
        share = found.needed / found.memory
        lines.append(
            f"fits, with {1 - share:.0%} to spare"
            if share <= 1
            else f"does not fit: {(share - 1) * found.memory / 2**30:.2f} GiB per device too much"
        )
    effort = " with little effort" if found.quick else ""
    lines.append(f"compiled in {found.compile_seconds:.0f} s{effort}")
    lines += ["", f"{'model FLOPs per step':<22}{found.model_flops:>11.3g}, on all devices"]

    kinds = {each.kind: [0, 0.0] for each in found.collectives}
    for each in found.collectives:
        kinds[each.kind][0] += each.times
        kinds[each.kind][1] += each.sent
    for kind, (count, sent) in kinds.items():
        lines.append(f"{kind:<22}{count:>6} per step, {sent / 2**20:,.1f} MiB sent per device")
    if not (found.cycles and found.chip):
        lines.append(
            "This compiler does not estimate cycles, so there is no step time and no price."
        )
        return "\n".join(lines)
    rate, hosts = found.photos_per_second, found.hosts
    lines += [
        "",
        "These times are estimates: the sum of the compiler's cycles of each fusion at"
        f" {found.chip.clock} GHz,",
        "plus collectives at the full speed of all links, with no overlap. They leave out waiting",
        "for copies in memory, for slower chips and for the host.",
        *(["Without --quick: down to half the cycles, a few percent more memory."] * found.quick),
        f"{'cycles per step':<22}{found.cycles / 1e6:>10.1f} million on one device",
        f"{'step':<22}{found.step_seconds:>10.4f} s: {found.compute_seconds:.4f} of computation,"
        f" {found.collective_seconds:.4f} of collectives",
        f"{'MFU':<22}{found.mfu:>10.1%} of {found.chip.tflops * found.chips / 1000:,.1f} PFLOP/s;"
        f" {found.mfu_limit:.1%} at most, with matrix units of {found.chip.lanes} lanes",
        f"{'photos':<22}{rate:>10,.0f} per second, {rate / hosts:,.0f} from each of {hosts} hosts",
        f"{'run':<22}{found.hours:>10,.1f} hours of {found.steps:,} steps",
    ]
    if found.price_per_chip_hour:
        price = found.price_per_chip_hour
        lines.append(f"{'price':<22}{found.price:>10,.0f} at {price} per chip-hour")
    return "\n".join(lines)


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, to compile for.

    Args:
      topology: KIND:SHAPE for TPUs, such as v5e:16x16; cpu:N for N simulated devices, which needs
        a process in which JAX has not started; gpu for the GPUs of this machine.

    Raises:
      UserError: the topology does not exist, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdecimal() and len(shape) <= 4 and int(shape):
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")
    if topology == "gpu":
        try:
            return jax.devices("gpu")
        except RuntimeError:
            raise UserError(
                "--topology=gpu: JAX finds no GPU on this machine; give a TPU topology or cpu:N."
            ) from None
    if kind not in CHIPS or not shape:
        raise UserError(
            f"--topology={topology} is unknown; give KIND:SHAPE, such as v4:4x4x8 or v5e:16x16,"
            f" where KIND is one of {', '.join(CHIPS)}, or give cpu:N or gpu."
        )
    # On a machine without a TPU libtpu needs these variables.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Planning does not use the TPU, so it may run beside a process that does.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Generating the code of each fusion takes most of the time; use all cores for it.
    threads = f"--xla_jf_internal_num_threads={os.cpu_count()}"
    parallel = f"{threads} --xla_tpu_impure_hlo_parallel_compile=true"
    os.environ.setdefault("LIBTPU_INIT_ARGS", parallel)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host_bounds(topology)
        ).devices
    except Exception as error:  # libtpu raises exceptions of several types
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The TPU compiler does not accept --topology={topology} ({reason}); install it with"
            " `pip install --require-hashes -r requirements-tpu.txt`, or give another shape."
        ) from None


def host_bounds(topology: str) -> tuple[int, int, int]:
    """The shape (x, y, z) of the chips of one host of KIND:SHAPE on Cloud TPU.

    A host has 2x2 chips. A topology that fits one host, up to v5e:2x4 and v6e:2x4, is one host
    (cloud.google.com/tpu/docs/v5e and v6e).
    """
    kind, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x") if side.isdecimal()]
    largest = max(CHIPS[kind].host_cores)
    if 0 < math.prod(sides) <= largest and len(sides) <= 3:
        x, y, z = [*sides, 1, 1][:3]
        return x, y, z
    return 2, 2, 1


def chips_of(devices: list[Any]) -> int:
    """The number of chips of some devices; on v3 and v4 each core of a chip is a device."""
    return len({str(getattr(device, "coords", device.id)) for device in devices})


def memory_of(topology: str, devices: list[Any]) -> int:
    """Bytes of memory per device of a topology; 0 if unknown."""
    chip = CHIPS.get(topology.partition(":")[0])
    return chip.memory * 2**30 * chips_of(devices) // len(devices) if chip else 0


def bytes_per_device(tree: Any) -> int:
    """Bytes of the shards that one device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def forward_pass(config: Config, program: Program, classes: int, photos: float) -> Any:
    """The jaxpr of a step's loss for the whole batch, from which `model_flops` is counted.

    The network is the published one: convolution groups are not merged and channels not padded.
    The input is crops, because cutting them is not part of the model.
    """
    plain = config.copy_and_resolve_references()
    plain.model.group_conv, plain.mesh.fsdp = "native", 1
    objective = build(
        config=plain, classes=classes, epoch_length=photos, devices=jax.devices()[:1]
    ).objective
    batch = jax.eval_shape(program.cut, program.abstract_batch)
    arguments = (program.abstract.params, program.abstract.extra, batch)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    step = jax.ShapeDtypeStruct((), "int32")
    return jax.make_jaxpr(objective.loss)(*arguments, jax.random.key(0), step).jaxpr
