"""What a network costs, counted and measured. Cheap to import."""

COSTS = {
    "latency": "netsmith.cost.latency:SpaceLatency",
    "params": "netsmith.cost.counts:Params",
    "macs": "netsmith.cost.counts:Macs",
    "peak_memory": "netsmith.cost.memory:PeakMemory",
    "ram": "netsmith.cost.memory:Ram",
    "flash": "netsmith.cost.counts:Flash",
    "file": "netsmith.cost.counts:FileBytes",
    "branches": "netsmith.cost.counts:BranchCount",
    "bitops": "netsmith.cost.bits:BitOps",
}
"""Name in a budget -> where its price is."""
