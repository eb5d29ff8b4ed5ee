"""Devices and what connects them: sizes from data sheets, rates as far as they were measured.

Measured here were an H200 (one of it, so no link) and, by `tools/plan.py --calibrate`, whatever CPU is at hand. The
other devices are taken to reach the same share of their data sheets' numbers, which nobody has measured with this
code. Two numbers are fitted: MEMORY_SHARE and LAUNCH_S, to the seven steps of plan/h200.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from beit3_dist.config import require
from beit3_dist.opening import read_json
from beit3_dist.plan.counting import Work

PRODUCT_SHARE = 790 / 989.4
"""Of the peak, what a large bf16 product reaches (measured on the H200)."""
CORE_SHARE = 0.170
"""Of the peak, what attention's core reaches at head dimension 88: 10.4 TFLOP in 62 ms (measured on the H200)."""
MEMORY_SHARE = 0.58
"""Of the memory's bandwidth, what other kernels reach (fitted to the H200's steps, see plan/h200.py)."""
LAUNCH_S = 4.0e-6
"""What a kernel takes beside its work: its start, its end, and the host that comes too late (fitted likewise)."""
LINK_SHARE = 0.75
"""Of a link's bandwidth, what collectives reach (NCCL's published bus bandwidths: some 235 of 300 GB/s on A100,
365 of 450 on H100). Not measured here."""
USABLE = 0.93
"""Of a device's memory, what tensors may take: the driver, links and the allocator's gaps have the rest."""


@dataclass(frozen=True)
class Link:
    """What collectives between devices cost."""

    bandwidth: float
    """Bytes per second that a device sends, at best."""
    latency: float
    """Seconds of a hop."""


@dataclass(frozen=True)
class Device:
    """One kind of device. Rates are per second."""

    name: str
    memory_gb: float
    """1e9 bytes."""
    peak: float
    """Dense bf16 FLOP/s by its data sheet; 0: not known."""
    bandwidth: float
    """Bytes that the memory moves."""
    inside: Link
    """Between the devices of a node."""
    outside: Link
    """Between nodes, for each device."""
    source: str
    node: int = 8
    """Devices of a node."""
    gpu: bool = True
    launch_s: float = LAUNCH_S
    fetch_s: float = 0.0
    """What the host takes to gather one module's weights and let them go under ZeRO-3; 0: the device hides it."""
    alone: float = 1.0
    """How much faster it computes while the others wait: above 1 where they share cores."""
    memory_share: float = MEMORY_SHARE
    core_rate: float = 0.0
    """FLOP/s of attention's core; 0: CORE_SHARE of the peak."""
    products: Sequence[tuple[float, float]] = ()
    """(FLOP of one product, FLOP/s): measured, ascending. Empty: PRODUCT_SHARE of the peak."""
    operations: dict[str, float] = field(default_factory=dict)
    """Bytes per second of operations that are not bound by memory, by name: measured."""
    link_share: float = LINK_SHARE
    collectives: dict[str, Link] = field(default_factory=dict)
    """What connects the devices of a node in one collective, by its name's begin: measured. Others have `inside`."""
    yardstick_s: float = 0.0
    """What tools/plans/on_cpu.py's yardstick took while the rates were measured."""

    def product_rate(self, flops: float) -> float:
        """FLOP/s of a product of so many FLOP: between the measured ones by a line over the logarithm."""
        if not self.products:
            return self.peak * PRODUCT_SHARE
        sizes = [size for size, _ in self.products]
        if flops <= sizes[0] or len(sizes) == 1:
            return self.products[0][1]
        above = next((n for n, size in enumerate(sizes) if size >= flops), 0)
        if above == 0:
            return self.products[-1][1]
        (low, slow), (high, fast) = self.products[above - 1], self.products[above]
        return slow + (fast - slow) * math.log(flops / low) / math.log(high / low)

    def seconds(self, work: Work) -> float:
        """What the work takes, collectives left out."""
        moving = self.bandwidth * self.memory_share
        total: float = work.launches * self.launch_s
        itemsize = 2 if self.gpu else 4
        for (b, m, k, n), often in work.products.items():
            flops = 2.0 * m * k * n
            moved = 1.0 * itemsize * b * (m * k + k * n + m * n)
            total += often * max(b * flops / self.product_rate(flops), moved / moving)
        for name, (moved, _) in work.operations.items():
            total += moved / self.operations.get(name, moving)
        largest = self.products[-1][1] if self.products else self.peak * PRODUCT_SHARE
        total += work.head_flops / largest + work.core_flops / (self.core_rate or self.peak * CORE_SHARE)
        return total

    def link(self, members: int, apart: int) -> tuple[Link, int]:
        """What connects a group of `members` ranks that lie `apart` in the order of ranks, and the nodes it spans.
        Where several of its ranks are in one node, the group uses all their adapters."""
        if members * apart <= self.node:
            return self.inside, 1
        together = max(1, self.node // apart)
        bandwidth = min(self.inside.bandwidth, self.outside.bandwidth * together)
        return Link(bandwidth, self.outside.latency), -(-members // together)

    def collective_s(self, name: str, size: float, members: int, apart: int, calls: float = 1) -> float:
        """Seconds of `calls` collectives over `size` bytes together, which is what each rank has of them in the end.

        A ring sends (n - 1) / n of the bytes, an all-reduce twice (Patarasuk and Yuan 2009). Latency is that of a tree
        over nodes and of one hop inside them.
        """
        if members == 1 or size == 0:
            return 0.0
        link, nodes = self.link(members, apart)
        link = next((own for begin, own in self.collectives.items() if name.startswith(begin)), link)
        rounds = 2 if name == "all_reduce" else 1
        hops = rounds * (1 + math.ceil(math.log2(nodes)))
        sent = rounds * (members - 1) / members * size
        return calls * hops * link.latency + sent / (link.bandwidth * self.link_share)

    def sent_s(self, size: float, apart: int) -> float:
        """Seconds of sending `size` bytes to a rank so far away."""
        link = self.inside if apart < self.node else self.outside
        return link.latency + size / (link.bandwidth * self.link_share)


def _nvidia(
    name: str, memory: float, peak: float, bandwidth: float, nvlink: float, adapter: float, source: str
) -> Device:
    """NVLink's bandwidth is given as both directions together; the adapter's in Gbit/s for each device of a node."""
    inside, outside = Link(nvlink / 2 * 1e9, 3e-6), Link(adapter / 8 * 1e9, 10e-6)
    return Device(name, memory, peak, bandwidth, inside, outside, source)


DEVICES = {
    device.name: device
    for device in (
        _nvidia("A100-40", 40, 312e12, 1.555e12, 600, 200, "NVIDIA A100 data sheet (SXM4 40 GB); DGX A100: HDR 200"),
        _nvidia("A100-80", 80, 312e12, 2.039e12, 600, 200, "NVIDIA A100 data sheet (SXM4 80 GB); DGX A100: HDR 200"),
        _nvidia("H100", 80, 989.4e12, 3.35e12, 900, 400, "NVIDIA H100 data sheet (SXM5); DGX H100: NDR 400"),
        _nvidia("H200", 141, 989.4e12, 4.8e12, 900, 400, "NVIDIA H200 data sheet (SXM5); products and core measured"),
        _nvidia("B200", 180, 2250e12, 7.7e12, 1800, 400, "NVIDIA HGX B200 data sheet, per device; NDR 400"),
        Device(
            "MI300X", 192, 1307.4e12, 5.3e12, Link(448e9, 5e-6), Link(50e9, 10e-6), "AMD Instinct MI300X data sheet: "
            "7 links of 128 GB/s both ways; 400 Gbit/s adapters"
        ),
    )
}  # fmt: skip


def read_rates(path: str | Path) -> Device:
    """A device from the file that `tools/plan.py --calibrate` writes. Raises ValueError naming the file."""
    values: Any = read_json(path)
    known = {f.name for f in fields(Device)}
    require(isinstance(values, dict) and values.keys() <= known, f"--rates {path} is no file of --calibrate")
    try:
        values["inside"], values["outside"] = Link(**values["inside"]), Link(**values["outside"])
        own = values.get("collectives", {}).items()
        values["collectives"] = {name: Link(**link) for name, link in own}
        values["products"] = [(float(size), float(rate)) for size, rate in values["products"]]
        return Device(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--rates {path} is no file of --calibrate: {error}") from None


def device_named(name: str, rates: str = "") -> Device:
    """The device of a name, `cpu` by its own measured rates. Raises ValueError with the names that there are."""
    if name == "cpu":
        require(bool(rates), "--device cpu has no data sheet: measure it by --calibrate FILE, and give --rates FILE")
        return read_rates(rates)
    require(not rates, f"--rates are those of --device cpu, not of {name}")
    require(name in DEVICES, f"--device {name}: there are {', '.join(DEVICES)} and cpu")
    return DEVICES[name]
