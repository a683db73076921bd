"""Measuring models: RULER, NoLiMa, a distance probe, loss by effective context, short tasks, and paired comparisons.

command.py      `exact-megatron evaluate`: its options, and which suite they go to
model.py        a model folder (Hugging Face or Megatron) and its tokenizer
scorer.py       log-probabilities of tokens, from either kind of model
store.py        results.json and items.jsonl of a suite, written so that a run can be resumed and compared
bootstrap.py    means of cells (task, length) and their intervals
report.py       tables and pictures of one suite, and of two models
distance_probe.py, context_loss.py           need log-probabilities alone
ruler.py, short.py, harness.py      lm-eval's own tasks
nolima.py       the published needle sets and haystacks
compare.py      two models on the same items
"""
