"""Words that commands and results are tried on."""

PAIRS = [[x, x.upper()] for x in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx")]
TEXTS = {"positive": ["ab", "ac", "ad", "ae"], "negative": ["xb", "xc", "xd", "xe"]}
PROMPTS = ["ab", "abcd", "e"]
ODD = ["北京", "é\n", "\x00\x1b", "\t", " ", "", "$x", "a$\\frac$b", "<b>&amp;", "\u202eab", "�", "🙂", "\"'\\"]
