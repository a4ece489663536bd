#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0
#
# A tokenizer without a beginning-of-sequence token is changed in place when a TransformerBridge is made with it: its end token becomes its
# beginning token. From then on `to_tokens` begins every text with the end token, which the model never saw there, and the caller's own
# tokenizer says that it has a beginning token, in code that has nothing to do with the bridge.
#
# Seen:
#   bos_token before: None   after: </s>
#   to_tokens: [1, 2, 3]     the tokenizer itself: [2, 3]
#
# What to do: give a copy (copy.deepcopy), and prepend_bos=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 transformer-lens==3.9.0
cat > case.py <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "cat": 3}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
mine = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
mine.save_pretrained("model")
torch.manual_seed(0)
config = GPT2Config(vocab_size=4, n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=None, eos_token_id=1)
GPT2LMHeadModel(config).save_pretrained("model")

before = mine.bos_token
bridge = TransformerBridge.boot_transformers("model", tokenizer=mine, device="cpu")
tokens = bridge.to_tokens("the cat")[0].tolist()
print("bos_token before:", before, "after:", mine.bos_token)
print("to_tokens:", tokens, "the tokenizer itself:", mine("the cat").input_ids)
assert before is None and mine("the cat").input_ids == [2, 3]
assert mine.bos_token == "</s>" and tokens == [1, 2, 3], "this has changed: the tokenizer is left as it was"
PY
HF_HUB_OFFLINE=1 env/bin/python case.py 2> errors || { cat errors; exit 1; }
echo "seen again"
