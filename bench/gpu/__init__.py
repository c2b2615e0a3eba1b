"""The stages of `python -m fastbn.bench.gpu_check`.

run      rows, time, device
build    env and build
correct  every path against float64
speed    beside a copy and beside PyTorch
tools    compute-sanitizer and ncu
tables   what was found, beside the bars
"""
