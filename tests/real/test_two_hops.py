"""Questions in two hops on a real model: knowing both hops is not enough, and late states put back help, beside controls."""

from __future__ import annotations

import hookbook as hb
from tests.support.real import real

SOURCES, TARGETS = (12, 14, 16), (4, 7, 10)


def test_both_hops_are_known_and_the_question_is_answered_where_a_shortcut_answers_it():
    model = real("gemma-3-270m")
    questions = hb.hops.chain("city_country", "country_capital", 40, shots=2)
    found = hb.two_hops(model, questions)
    both = found.select()
    alone, helped = found.select(shortcut=False), found.select(shortcut=True)
    right = found.right["composed"]
    assert len(both) >= 25 and len(alone) >= 12 and len(helped) >= 8
    assert right[helped].float().mean() >= 0.6 and right[alone].float().mean() <= 0.2

    wrong = [questions[i] for i in found.select(composed=False)][:16]
    back = hb.backpatch(model, wrong, pairs=[(source, target) for source in SOURCES for target in TARGETS])
    assert not back.clean.any()
    rates = back.region()
    assert rates["patch"].mean >= 0.04 and rates["patch"].mean >= 3 * rates["shuffled"].mean
    assert rates["random"].mean <= 0.02 and rates["swapped"].mean <= 0.02
