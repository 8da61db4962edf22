# SPDX-License-Identifier: Apache-2.0
"""TPU chips, descriptions of slices, and the least time that work takes on them."""

import dataclasses
import importlib.util
import math
import os
import re

import numpy as np

from launch.plan.hlo_cost import Costs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip. Sources: the chip's page under cloud.google.com/tpu/docs, except `hbm_bytes`."""

    flops: float  # per second, bf16, peak
    hbm_bytes: float  # what a program may use: the limit that libtpu 0.0.42's compiler enforces
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second, one interconnect link, one direction
    torus: int  # dimensions of the interconnect; two links each
    example: str  # a slice
    options: tuple[tuple[str, str], ...] = ()  # for the compiler


CHIPS = {
    # v4: 275 TFLOP/s, 32 GiB, 1,200 GB/s; 2,400 Gb/s of interconnect over 6 links. Two cores act as
    # one device, as on Cloud TPU.
    "v4": Chip(
        275e12, 30.75 * GIB, 1.2e12, 50e9, 3, "v4:4x4x4", (("chip_config_name", "megacore"),)
    ),
    # v5e: 197 TFLOP/s, 16 GB, 800 GiB/s; 400 GB/s both ways over 4 links.
    "v5e": Chip(197e12, 15.75 * GIB, 800 * GIB, 50e9, 2, "v5e:16x16"),
    # v5p: 459 TFLOP/s, 95 GiB, 2,765 GB/s; 1,200 GB/s both ways over 6 links.
    "v5p": Chip(459e12, 95.74 * GIB, 2.765e12, 100e9, 3, "v5p:4x4x4"),
    # v6e: 918 TFLOP/s, 32 GB, 1,638 GB/s; 800 GB/s both ways over 4 links.
    "v6e": Chip(918e12, 31.25 * GIB, 1.638e12, 100e9, 2, "v6e:16x16"),
    # tpu7x: 2,307 TFLOP/s, 192 GiB, 7,380 GB/s; 1,200 GB/s both ways over 6 links. Each of its two
    # cores is a device.
    "tpu7x": Chip(2307e12, 2 * 94.75 * GIB, 7.38e12, 100e9, 3, "tpu7x:4x4x4"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of a pod to compile for."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the interconnect
    devices: tuple  # what a mesh is made of

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices_per_chip(self) -> int:
        return len(self.devices) // self.num_chips

    @property
    def hbm_bytes(self) -> float:
        """Of one device."""
        return self.chip.hbm_bytes / self.devices_per_chip

    @property
    def flops(self) -> float:
        """Per second, of one device."""
        return self.chip.flops / self.devices_per_chip

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes per second, of one device."""
        return self.chip.hbm_bandwidth / self.devices_per_chip

    def group_bandwidth(self, coordinates: np.ndarray) -> float:
        """Bytes per second that one device of a group can send around a ring of the group.

        Two links along each dimension that the group spans, one where it spans a line that does not
        close (2D chips close dimensions of 16, 3D ones multiples of 4).

        Args:
          coordinates: int[devices of the group, dimensions], in the slice.
        """
        links = 0
        for i, size in enumerate(self.shape):
            span = len(np.unique(coordinates[:, i]))
            closes = size % 4 == 0 if self.chip.torus == 3 else size == 16
            if span > 1:
                links += 2 if span == size and closes else 1
        if links == 0:  # the two cores of a chip: their bridge is as fast as six links
            return 6 * self.chip.link_bandwidth
        return links * self.chip.link_bandwidth / self.devices_per_chip


def describe(topology: str) -> Slice:
    """The slice that `topology` ("v5p:4x4x4") names; no TPU is needed.

    Raises:
      ValueError: unknown chip, a shape it does not come in, or no libtpu to compile with.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise ValueError(
            f"--topology={topology} names the chip {kind!r}, which is unknown here: a topology is "
            f"CHIP:AxB or CHIP:AxBxC, for example one of {known}. Set --topology=v5p:4x4x4."
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) or shape.count("x") != chip.torus - 1:
        raise ValueError(
            f"--topology={topology}: a {kind} slice has {chip.torus} dimensions, in chips. Set "
            f"--topology={chip.example}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning compiles for TPUs, and their compiler (libtpu) is not installed. It needs no "
            "TPU: pip install 'opd_jax[tpu]'."
        )
    return Slice(topology, chip, tuple(int(n) for n in shape.split("x")), _devices(topology, chip))


def _devices(topology: str, chip: Chip) -> tuple:
    # libtpu would ask the cloud's metadata server which TPU this machine has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # It would lock a TPU for one process; there is none, and several may plan at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **dict(chip.options)
        )
    except JaxRuntimeError as error:
        raise ValueError(
            f"--topology={topology} is refused by the TPU compiler: {str(error).splitlines()[0]}. "
            f"Set --topology={chip.example}."
        ) from error
    return tuple(described.devices)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """The least time that each resource needs; the largest of them is the prediction."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def total(self) -> float:
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def bound(self) -> str:
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(costs: Costs, chips: Slice, mesh_devices: list) -> Seconds:
    """Seconds of one run of a module; `mesh_devices` in the order of the module's partitions."""
    coordinates = np.array([device.coords for device in mesh_devices])[:, : len(chips.shape)]
    sending = sum(
        num_bytes / chips.group_bandwidth(coordinates[list(group)])
        for (_, group), num_bytes in costs.collectives.items()
    )
    return Seconds(costs.flops / chips.flops, costs.hbm_bytes / chips.hbm_bandwidth, sending)
