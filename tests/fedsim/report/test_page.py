"""The page opens anywhere, loads nothing, and says what the report says."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from fedsim import report as reports
from fedsim.audit import judge
from fedsim.report import figures, words
from fedsim.report.pairs import SHOWN, choose
from tests.fedsim.audit.run_folders import build

HOSTILE = '<script>alert("x")</script>{{ 7 * 7 }}</title><img src=https://example.org/x onerror=a>'
DEFENDED = {
    "scenario": {"title": HOSTILE, "defenses": "clip(norm=1.0)", "channel": "secagg"},
    "receipts": [
        {
            "name": HOSTILE,
            "parameters": {"norm": HOSTILE},
            "changed": True,
            "cosine": 0.9,
            "norm_ratio": 0.3,
            "seconds": 0.1,
        }
    ],
    "oracles": ("labels",),
    "federation": {
        "failures": [
            {"round": 1, "client": c, "reason": HOSTILE, "refused": True} for c in range(60)
        ],
        "channel": {"name": HOSTILE, "quantization_step": 1e-6},
        "privacy": [
            {"name": HOSTILE, "epsilon": 8.0, "delta": 1e-5, "unit": HOSTILE, "mechanism": "m"}
        ],
    },
}
VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (
            tag in ("rect", "path") and self.get_starttag_text()[-2] == "/"
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def written(folder):
    report = judge(folder)
    path = reports.write(folder, report)
    return report, path, Page(path.read_text())


def variants():
    def vaultless(folder):
        build(folder)
        shutil.rmtree(folder / "vault")
        return folder

    def killed(folder):
        build(folder)
        (folder / "federation.json").unlink()
        shutil.rmtree(folder / "reconstructions")
        return folder

    return {
        "attacked": build,
        "defended": lambda folder: build(folder, **DEFENDED),
        "honest": lambda folder: build(folder, scenario={"attack": "none"}),
        "gray": lambda folder: build(folder, scenario={"data": {"dataset": "digits"}}),
        "vaultless": vaultless,
        "killed": killed,
    }


VARIANTS = variants()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_gets_a_well_formed_page_that_loads_nothing(tmp_path, variant):
    report, path, page = written(VARIANTS[variant](tmp_path / "run"))
    assert path == (tmp_path / "run/report.html").absolute()
    assert report.verdict in page.text
    for tag in ("script", "link", "iframe", "object", "embed", "video", "audio", "base", "form"):
        assert not page.all(tag)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    style = re.findall(r"<style>(.*?)</style>", path.read_text(), re.S)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_the_page_can_be_read_by_ear_and_on_a_phone(tmp_path):
    _, _, page = written(build(tmp_path / "run", **DEFENDED))
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert all(image.get("alt") for image in page.all("img"))
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) >= 5
    assert all(cell.get("scope") for cell in page.all("th"))
    assert len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for a in page.all("section")]
    assert set(named) <= set(ids)


def test_alternative_texts_name_the_image_and_its_fate(tmp_path):
    report, _, page = written(build(tmp_path / "run"))
    texts = [image["alt"] for image in page.all("img")]
    first = max(report.examples, key=lambda e: e.psnr)
    label = report.classes[first.label]
    said = f"private image {first.index} of client {first.client}, class {label}"
    assert texts[0] == said
    assert texts[1] == "reconstruction, PSNR identical, leaked"
    assert any(re.fullmatch(r"reconstruction, PSNR \d+\.\d dB, not leaked", t) for t in texts)


def test_nothing_from_a_scenario_or_a_client_becomes_markup(tmp_path):
    _, path, page = written(build(tmp_path / "run", **DEFENDED))
    assert HOSTILE in page.text
    assert "<script" not in path.read_text()


def test_shown_pictures_are_the_private_images_themselves(tmp_path):
    folder = build(tmp_path / "run")
    report = judge(folder)
    pairs = choose(folder, report)
    for pair in pairs.worst[:4]:
        assert pair.example.mse < 1e-10
        assert pair.truth == pair.recovered
        content = base64.b64decode(pair.truth.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(content)).size == (32, 32)


def test_worst_leaks_come_first_and_the_sample_ignores_the_outcome(tmp_path):
    folder = build(tmp_path / "run")
    report = judge(folder)
    pairs = choose(folder, report)
    closeness = [pair.example.psnr for pair in pairs.worst]
    assert closeness == sorted(closeness, reverse=True)
    assert len(pairs.worst) == len(pairs.sample) == SHOWN
    shuffled = report.model_copy(
        update={"examples": [e.model_copy(update={"leaked": False}) for e in report.examples]}
    )
    again = choose(folder, shuffled)
    assert [(p.example.client, p.example.index) for p in again.sample] == [
        (p.example.client, p.example.index) for p in pairs.sample
    ]


def test_secure_aggregation_is_not_oversold(tmp_path):
    folder = build(tmp_path / "run")
    report = judge(folder)
    aggregated = report.attack.model_copy(update={"aggregated": True})
    path = reports.write(folder, report.model_copy(update={"attack": aggregated}))
    assert "honest-but-curious server only" in Page(path.read_text()).text


def test_a_failed_run_wears_its_failure_first(tmp_path):
    folder = build(tmp_path / "run", used=())
    report, path, page = written(folder)
    assert report.failed
    assert 'class="verdict broken"' in path.read_text()
    after = page.text.split("Verdict", 1)[1].strip()
    assert after.startswith("This run failed and its figures must not be believed")
    assert json.loads((folder / "report.json").read_text())["failed"] == report.failed


def test_figures_hold_every_value_inside_their_frame():
    drawn = figures.histogram(
        [-5.0, 0.0, 19.9, 60.0, 200.0], low=0, high=60, bins=30, label="PSNR", floor=300.0
    )
    places = [float(x) for x in re.findall(r'(?:x|d)="M?(-?[\d.]+)', str(drawn))]
    assert all(0 <= x <= figures.WIDTH for x in places)
    assert str(drawn).count('class="bar"') == 3
    assert "NaN" not in drawn


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.seconds(0.041), "0.041 s"),
        (words.seconds(3.25), "3.2 s"),
        (words.seconds(119.6), "2 min 0 s"),
        (words.seconds(7500), "2 h 5 min"),
        (words.seconds(None), "not measured"),
        (words.size(999), "999 B"),
        (words.size(12_345_678), "12.3 MB"),
        (words.size(5_000_000_000_000), "5 TB"),
        (words.decibel(21.26), "21.3 dB"),
        (words.decibel(131.4), "131 dB"),
        (words.decibel(200.0), "identical"),
        (words.share(0.001), "under 1 %"),
        (words.share(0.999), "over 99 %"),
        (words.share(1.0), "100 %"),
        (words.count(1_700_000), "1\u202f700\u202f000"),
        (words.arguments({"norm": 1.0}), "norm=1.0"),
    ],
)
def test_numbers_are_said_for_people(said, expected):
    assert said == expected


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
addEventListener("load", () => {
  const page = document.documentElement;
  const wide = [...document.querySelectorAll("main *")].filter(
    (part) => part.getBoundingClientRect().right > innerWidth + 1 && !part.closest(".table, pre"));
  document.body.dataset.probe = JSON.stringify({
    overflow: page.scrollWidth - page.clientWidth,
    wide: wide.map((part) => part.outerHTML).slice(0, 3),
    broken: [...document.images].filter((image) => !image.naturalWidth).length,
    images: document.images.length, ink: getComputedStyle(document.body).color,
    ground: getComputedStyle(document.body).backgroundColor,
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_sideways_scrolling(tmp_path, width, scheme):
    """The probe is added to a copy of the page, whose policy is lifted for it."""
    _, path, _ = written(build(tmp_path / "run", **DEFENDED))
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy".*?>', "", path.read_text(), flags=re.S
    )
    inner = tmp_path / "inner.html"
    inner.write_text(text.replace("</body>", PROBE))
    outer = tmp_path / "outer.html"
    # A headless window is at least 500 pixels wide; a frame can be as narrow as a phone.
    outer.write_text(
        f'<iframe src="inner.html" width="{width}" height="2000"></iframe><script>'
        'addEventListener("load", () => setTimeout(() => { document.body.dataset.probe ='
        " document.querySelector('iframe').contentDocument.body.dataset.probe; }, 200));</script>"
    )
    found = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    told = re.search(r'data-probe="([^"]*)"', found)
    assert told, found[-2000:]
    probe = json.loads(told[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert probe["overflow"] <= 0
    assert probe["wide"] == []
    assert probe["broken"] == 0
    assert probe["images"] == 2 * 2 * SHOWN
    assert contrast(probe["ink"], probe["ground"]) > 7
    brightness = sum(map(int, re.findall(r"\d+", probe["ground"])[:3]))
    assert (brightness < 384) == (scheme == "dark")


def contrast(first: str, second: str) -> float:
    """Return the WCAG contrast ratio of two ``rgb(r, g, b)``."""

    def luminance(color: str) -> float:
        parts = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_pair_of_colors_that_meets_can_be_read():
    """Text on its ground: at least 4.5 to 1 (WCAG AA), in light and in dark."""
    from fedsim.report.style import STYLE

    schemes = re.findall(r":root \{(.*?)\n\s*\}", STYLE, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        rgb = {
            k: f"rgb({int(v[1:3], 16)}, {int(v[3:5], 16)}, {int(v[5:], 16)})"
            for k, v in color.items()
        }
        meets = [
            ("ink", "ground"),
            ("ink", "sheet"),
            ("quiet", "sheet"),
            ("quiet", "ground"),
            ("leak", "leak-soft"),
            ("safe", "safe-soft"),
            ("ink", "warn-soft"),
            ("quiet", "warn-soft"),
        ]
        for text, ground in meets:
            assert contrast(rgb[text], rgb[ground]) >= 4.5, (text, ground)


def test_the_page_says_what_the_releases_make_of_a_guess(tmp_path):
    """One release of as much noise as sensitivity: epsilon 4.377 at 1e-5, 10 % become 38.9 %."""
    defended = json.loads(json.dumps(DEFENDED))
    defended["receipts"][0]["releases"] = [[1.0, 1.0, 1, 0.0]]
    _, _, page = written(build(tmp_path / "run", **defended))
    assert "Right, at most" in page.text
    assert "4.38 39 %" in page.text
