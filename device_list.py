"""Layouts: which stage of which pipeline runs on which device.

A row is a stage, a column is a pipeline; equal adjacent rows are one stage. `--placement NAME` picks one of these,
`--placement FILE.py:NAME` one of another file; without it, `my_device` is used. pipe_P_S has P pipelines of S stages.
Where there is no CUDA, a gpu runs on the CPU.
"""

from pipeline.placement import cpu, gpu, rcpu, rgpu

# One pipeline of four stages, or whole-model replicas, on one machine.
device_local = [[gpu(0)], [gpu(1)], [gpu(2)], [gpu(3)]]
device_4dp = [[gpu(0), gpu(1), gpu(2), gpu(3)]] * 4
device_8dp = [[gpu(0), gpu(1), gpu(2), gpu(3), gpu(4), gpu(5), gpu(6), gpu(7)]] * 4
single = [[gpu(0)]] * 4

# Two pipelines of four stages on one machine with 8 GPUs.
pipe_2_4 = [
    [gpu(0), gpu(4)],
    [gpu(1), gpu(5)],
    [gpu(2), gpu(6)],
    [gpu(3), gpu(7)],
]

# Two machines with 8 GPUs each.
pipe_4_4 = [
    [rgpu("w0", 0), rgpu("w0", 4), rgpu("w1", 0), rgpu("w1", 4)],
    [rgpu("w0", 1), rgpu("w0", 5), rgpu("w1", 1), rgpu("w1", 5)],
    [rgpu("w0", 2), rgpu("w0", 6), rgpu("w1", 2), rgpu("w1", 6)],
    [rgpu("w0", 3), rgpu("w0", 7), rgpu("w1", 3), rgpu("w1", 7)],
]
_even = [rgpu(host, index) for host in ("w0", "w1") for index in (0, 2, 4, 6)]
_odd = [rgpu(host, index) for host in ("w0", "w1") for index in (1, 3, 5, 7)]
pipe_8_2 = [_even, _even, _odd, _odd]  # four rows, two stages
pipe_16_1 = [[rgpu(host, index) for host in ("w0", "w1") for index in range(8)]] * 4

# Four and eight machines with 8 GPUs each: two pipelines on every machine.
pipe_8_4 = [[rgpu(f"w{host}", first + stage) for host in range(4) for first in (0, 4)] for stage in range(4)]
pipe_16_4 = [[rgpu(f"w{host}", first + stage) for host in range(8) for first in (0, 4)] for stage in range(4)]

# CPUs of one machine, for trying things out: local_SxP has S stages and P pipelines.
local_1x1 = [[cpu(0)]]
local_1x2 = [[cpu(0), cpu(1)]]
local_1x3 = [[cpu(0), cpu(1), cpu(2)]]
local_1x4 = [[cpu(0), cpu(1), cpu(2), cpu(3)]]
local_2x1 = [[cpu(0)], [cpu(1)]]
local_2x2 = [[cpu(0), cpu(2)], [cpu(1), cpu(3)]]
local_3x1 = [[cpu(0)], [cpu(1)], [cpu(2)]]
local_4x1 = [[cpu(0)], [cpu(1)], [cpu(2)], [cpu(3)]]
local_4x2 = [[cpu(0), cpu(4)], [cpu(1), cpu(5)], [cpu(2), cpu(6)], [cpu(3), cpu(7)]]
local_2x3 = [[cpu(0), cpu(2), cpu(4)], [cpu(1), cpu(3), cpu(5)]]
local_4x4 = [[cpu(4 * pipeline + stage) for pipeline in range(4)] for stage in range(4)]
local_1x8 = [[cpu(pipeline) for pipeline in range(8)]]
local_1x16 = [[cpu(pipeline) for pipeline in range(16)]]

# CPUs of two machines: every pipeline crosses from w0 to w1.
two_hosts_2x2 = [
    [rcpu("w0", 0), rcpu("w0", 1)],
    [rcpu("w1", 0), rcpu("w1", 1)],
]

my_device = pipe_4_4  # used when --placement names no other
