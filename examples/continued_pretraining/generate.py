"""Let a Hugging Face folder go on with a line of Python: python generate.py FOLDER."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("def fibonacci(n):\n", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]))
