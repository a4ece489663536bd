#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0
#
# A TransformerBridge does not use the tokenizer that it is given, if that adds no beginning-of-sequence token (as most do that were trained
# without one, such as GPT-2's and SmolLM2's): it loads another from the files, so that it adds one. What the caller had set on the tokenizer
# in memory (a normaliser, added tokens, a chat template) is gone without a word, when the model is made (`tokenizer=`) and when it is set
# later (`bridge.tokenizer = mine`). Texts are cut otherwise, so every number is of another prompt.
#
# Seen, for a tokenizer that lowers letters:
#   the tokenizer itself:              [2, 4]
#   a bridge that was made with it:    [3, 4]
#   after bridge.tokenizer = mine:     [3, 4]
#
# What to do: save_pretrained the changed tokenizer, and load from there; or compare bridge.to_tokens with your tokenizer before you measure.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 transformer-lens==3.9.0
cat > case.py <<'PY'
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<s>", "</s>", "the", "The", "cat"])}
backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained("model")
torch.manual_seed(0)
config = GPT2Config(vocab_size=5, n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=0, eos_token_id=1)
GPT2LMHeadModel(config).save_pretrained("model")

mine = AutoTokenizer.from_pretrained("model")
mine.backend_tokenizer.normalizer = normalizers.Lowercase()
bridge = TransformerBridge.boot_transformers("model", tokenizer=mine, device="cpu")
made = bridge.to_tokens("The cat", prepend_bos=False)[0].tolist()
bridge.tokenizer = mine
later = bridge.to_tokens("The cat", prepend_bos=False)[0].tolist()
print("the tokenizer itself:", mine("The cat").input_ids)
print("a bridge that was made with it:", made)
print("after bridge.tokenizer = mine:", later)
assert mine("The cat").input_ids == [2, 4], "the tokenizer itself lowers letters"
assert made == later == [3, 4] and bridge.tokenizer is not mine, "this has changed: the bridge uses the tokenizer that it was given"
PY
HF_HUB_OFFLINE=1 env/bin/python case.py 2> errors || { cat errors; exit 1; }
echo "seen again"
