"""Every kind of result: drawn without a warning, a view with something in it, and a report that needs nothing else."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
import torch

import hookbook as hb
from hookbook.errors import Refused, ResultError
from hookbook.show import html as report
from hookbook.show.page import LARGEST, pictures
from hookbook.testing import toy
from tests.makers import MAKERS, kinds, result
from tests.support.needs import require

KINDS = kinds()


def name_of(kind) -> str:
    return kind if isinstance(kind, str) else kind.values[0]


class Tags(HTMLParser):
    """All tags of a page, with their attributes, and their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def test_there_is_a_maker_for_every_kind_of_result():
    assert {name_of(kind).removeprefix("hooked-") for kind in KINDS} == set(MAKERS) and len(MAKERS) >= 27


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_drawn_without_a_warning(kind, plt, caplog):
    made, before = result(kind), dict(plt.rcParams)
    caplog.clear()  # what was said when it was made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        ax = made.plot()
        ax.figure.savefig(__import__("io").BytesIO())
        drawn = list(pictures(made))
    assert dict(plt.rcParams) == before and not plt.get_fignums()[1:] and not caplog.records
    assert ax.get_xlabel() and any(map(ax.get_title, ("left", "center"))), "axes and pictures have names"
    assert all(png.startswith(b"\x89PNG") and len(png) > 3000 and len(words) > 20 for _, words, png in drawn)
    assert [name for name, *_ in drawn][0] == "plot"
    width, height = ax.figure.get_size_inches()
    assert width <= 14 and height <= 10
    mine = plt.figure(figsize=(5, 4)).subplots()
    assert made.plot(ax=mine) is mine


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_has_something_in_it(kind):
    require("circuitsvis")
    html = result(kind).view().html
    tags = Tags(html)
    cells = len(tags.all("td")) + len(tags.all("span"))
    assert cells >= 2 or ("data-hookbook-view" in html and '"tokens": []' not in html)
    assert not re.search(r'(src|href)=["\']?https?:', html) and "unpkg.com" not in html and len(html) < 1_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_one_small_page_that_needs_nothing_else(kind, tmp_path):
    require("circuitsvis")
    path = result(kind).report(tmp_path / "new" / "page.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < LARGEST and [one.name for one in path.parent.iterdir()] == ["page.html"]
    tags = Tags(page)
    assert (
        not [attrs for _, attrs in tags.tags if re.match("(https?:)?//", attrs.get("src") or "")]
        and not tags.all("link")
        and "@import" not in page
    )
    assert all((attrs.get("href") or "").startswith("https://") for attrs in tags.all("a"))
    images = tags.all("img")
    assert images and all(len(image["alt"] or "") > 20 and (image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert len(tags.all("table")) == len(tags.all("caption")) >= 3 and all("scope" in attrs for attrs in tags.all("th"))
    boxes = [attrs for attrs in tags.all("div") if "box" in (attrs.get("class") or "")]
    assert boxes and all(attrs["role"] == "region" and attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in boxes)
    (policy,) = [meta["content"] or "" for meta in tags.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert (
        "default-src 'none'" in policy and "unsafe-inline" not in policy.replace("style-src 'unsafe-inline'", "") and "http" not in policy
    )
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads[:2] == ["What this is", "Pictures"] and {"Numbers", "Settings", "Model"} <= set(heads)
    again = result(kind).report(tmp_path / "again.html").read_text(encoding="utf-8")
    assert again == page


def test_a_report_says_which_paper_and_which_controls():
    from hookbook.show import page as reporting

    page = reporting.of(result("Patchscope"), result("Patchscope").view)
    assert '<a href="https://arxiv.org/abs/2401.06102">' in page and "control logprobs" in page and "Tokens" in page and "sources 1" in page
    assert 'data-hookbook-view="' in page and page.count("DecompressionStream") == 1


def test_a_long_table_is_cut_and_says_so():
    import pandas as pd

    frame = pd.DataFrame({"a": range(500), "b": 0.123456})
    assert "the first 200 of 500 rows" in (cut := report.frame_table(frame, "Numbers")) and cut.count("<tr>") == 201 and "0.1235" in cut
    assert "rows" not in report.frame_table(frame.head(3), "Numbers")


def test_what_does_not_fit_is_left_out(monkeypatch):
    from hookbook.show import page as reporting

    made = result("Patchscope")
    whole = reporting.of(made, made.view)
    monkeypatch.setattr(reporting, "LARGEST", len(whole.encode()))
    assert "data-hookbook-view" not in (cut := reporting.of(made, made.view)) and "<img" in cut and "<h2>View</h2><p>Left out" in cut
    assert "Left out" not in whole


def test_a_page_brings_the_library_of_its_views_once(tmp_path):
    require("circuitsvis")
    one, other = result("Patchscope").view(prompt=0), result("Patchscope").view(prompt=1)
    page = (one + other).save(tmp_path / "both.html").read_text()
    assert page.count("data-hookbook-view=") >= 2 and len(page) < 1.1 * len(one.html)


@pytest.mark.parametrize("text", ["</script><b>hi", "<img src=x onerror=alert(1)>", "<!--<script>"])
def test_text_stays_text(text):
    page = report.page(text, [(text, text, report.table([text], [[text]], text) + report.picture(b"", text))], text)
    assert text not in page and "<script" not in page
    assert "script-src" not in page


def test_a_chat_with_odd_letters_is_reported(tmp_path):
    require("circuitsvis")
    page = hb.logit_lens(hb.testing.toy(), "北京 مرحبا \u202e</script>").report(tmp_path / "odd.html").read_text(encoding="utf-8")
    assert "北京" in page and "\u202e" not in page


def test_controls_are_what_is_named_so(tmp_path):
    """Parts of a field, and what is computed, too; not what is measured."""

    def named(kind):
        section = "".join(
            re.findall("<h2>Controls</h2>.*?</section>", result(kind).report(tmp_path / f"{kind}.html").read_text(encoding="utf-8"), re.S)
        )
        return re.findall(r"<tr><th scope=row>(.*?)</th>", section)

    assert named("Backpatch") == [
        "clean",
        "right shuffled",
        "right random",
        "right swapped",
        "clean logprobs",
        "logprobs shuffled",
        "logprobs random",
        "logprobs swapped",
    ]
    assert named("Steering") == ["base", "random"] and named("FeatureVector") == []
    assert named("SAEReport") == ["loss", "loss zero"] and named("DirectionChoice") == ["base 1", "base 2"]


def test_prompts_that_are_rows_are_under_no_prompts_name(tmp_path):
    page = hb.logit_lens(toy(), ["first", "second", "third"]).report(tmp_path / "lens.html").read_text(encoding="utf-8")
    (section,) = re.findall("<h2>Tokens</h2>.*?</section>", page, re.S)
    assert "<h3>" not in section and [section.count(f"<th scope=row>{name}</th>") for name in ("first", "second", "third")] == [1, 1, 1]


def test_a_report_is_never_larger_than_promised(tmp_path, monkeypatch):
    from hookbook.show import page as reporting

    lens = hb.logit_lens(toy(n_layers=12, n_ctx=512), ["ab" * 200, "cd" * 200], position=slice(None))
    page = lens.report(tmp_path / "long.html").read_text(encoding="utf-8")
    assert len(page.encode()) < LARGEST and page.count("rows after the first 100 are left out") >= 2
    without = page[: page.index("<h2>Tokens</h2>")], page[page.index("<h2>Controls</h2>") :]
    monkeypatch.setattr(reporting, "LARGEST", sum(map(len, without)))
    cut = reporting.of(lens, lens.view)
    assert not re.search('class="box grid"|data-hookbook-view="', cut) and len(re.findall("<h2>(?:Tokens|View)</h2><p>Left out", cut)) == 2
    monkeypatch.setattr(reporting, "LARGEST", 1000)
    with pytest.raises(ResultError, match="at most 1,000 open quickly"):
        lens.report(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_a_result_of_ones_own_without_a_model_is_reported(tmp_path):
    require("matplotlib")

    @dataclass(frozen=True, eq=False)
    class Own(hb.results.Result):
        """Two numbers."""

        values: torch.Tensor

        def to_frame(self):
            import pandas as pd

            return pd.DataFrame({"value": self.values.tolist()})

        def plot(self, ax=None):
            from hookbook.show.plots import bars

            return bars(ax, ["a", "b"], self.values, "value")

    page = Own(torch.tensor([1.0, 2.0])).report(tmp_path / "own.html").read_text(encoding="utf-8")
    assert "<h1>Own</h1>" in page and f"Made with hookbook {hb.__version__}." in page and "<img" in page


@pytest.mark.parametrize(("kind", "title"), [("SAEReport", "SAE report"), ("LogitLens", "Logit lens")])
def test_a_title_keeps_its_capitals(kind, title):
    from hookbook.show import page as reporting

    require("circuitsvis")
    assert f"<h1>{title}, " in reporting.of(result(kind))


def test_pictures_of_an_unknown_circuitsvis_are_refused():
    from hookbook.show.circuitsvis import drawn

    with pytest.raises(Refused, match="does not know.*circuitsvis==1.43.3"):
        drawn("<div>rendered otherwise</div>")


def test_a_picture_that_cannot_be_written_leaves_no_figure(plt, monkeypatch):
    from matplotlib.figure import Figure

    def savefig(*args, **kwargs):
        raise OSError("disk full")

    made, before = result("Steering"), plt.get_fignums()
    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="disk full"):
        list(pictures(made))
    assert plt.get_fignums() == before
