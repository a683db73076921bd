"""`exact-megatron benchmark throughput`: EXACT against the same run without it, at the sizes people train.

One rank. A cell is a geometry, a window and a precision. In it one model takes blocks of whole training steps (loader, forward,
backward, optimizer) in turn for three arms, on the same samples: exact; baseline, the same document masks without weights;
and causal, without weights and with every sample as one document. Documents are random tokens with log-normal or given lengths.

cells.py       what a cell is, which cells a command asks for, how many layers fit, and the file of measured cells
results.py     ratios of the arms, the bars and the table
bench.py       a model with its three arms: their proof, their timed blocks, the profile
jobs.py        each model in a process of its own
plan.py        --plan: how long the cells take by their FLOPs
command.py     options, and the loop over the cells
"""
