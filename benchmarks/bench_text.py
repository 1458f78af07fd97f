"""Text streams: time per piece of text, how far ids lag behind it, and what provisional ids would cost the model.

    python benchmarks/bench_text.py [--passes 5]

English, Chinese and code (its own sources and docs; the Chinese is written out below), 1 to 20 characters a piece.
New: each pass begins with no word remembered; warm: with all of them. A piece's time is the smallest of the passes',
which takes out what other processes do. "extra": how many more tokens the model computes than the final ids are. Held
back, as the engine does it: none. Provisional: the text so far fed at once, what the next piece changes rolled back.
Needs the development dependencies, for the vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

from guardengine.text import vocabulary
from guardengine.text.retokenizer import Retokenizer
from guardengine.text.spans import HeldText
from guardengine.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CHINESE = (
    "人工智能的发展正在改变我们的生活方式。许多人认为，机器学习可以帮助医生更快地诊断疾病，但是也有人担心隐私和就业"
    "问题。专家建议：“在推广新技术之前，应该先制定明确的规则。”昨天下午三点，北京市的气温达到了35度，市民们纷纷躲进"
    "商场避暑。小明问老师：“为什么天空是蓝色的？”老师笑着回答，这是因为阳光穿过大气层时，蓝光比红光更容易被散射。"
    "春天来了，公园里的樱花开得正好，孩子们在草地上奔跑，老人坐在长椅上下棋。做番茄炒蛋需要两个鸡蛋、一个番茄、少许盐"
    "和糖；先把鸡蛋打散，热锅放油，炒熟后盛出，再炒番茄，最后一起翻炒均匀即可。这家公司去年的收入增长了百分之十二，"
    "主要得益于海外市场的扩张。如果您需要帮助，请拨打客服电话，我们将在二十四小时内回复。历史学家指出，丝绸之路不仅是"
    "贸易通道，也是文化交流的桥梁。编程时要注意变量的命名，好的名字能让别人一眼看懂代码的意图。"
)
SIZES: dict[str, Callable[[random.Random], int]] = {
    "1": lambda rng: 1,
    "1 to 20": lambda rng: rng.randint(1, 20),
    "20": lambda rng: 20,
}


def texts() -> dict[str, str]:
    pages = sorted((ROOT / "docs" / "design").glob("*.md"))
    return {
        "English": "".join(page.read_text() for page in pages)[:12_000],
        "Chinese": CHINESE,
        "code": (ROOT / "guardengine" / "core" / "engine_core.py").read_text()[:12_000],
    }


def pieces(text: str, size: Callable[[random.Random], int]) -> list[str]:
    rng, start, found = random.Random(0), 0, []
    while start < len(text):
        found.append(text[start : start + size(rng)])
        start += len(found[-1])
    return found


def measure(
    tokenizer: Tokenizer, retokenizer: Retokenizer, deltas: list[str], passes: int, *, is_warm: bool
) -> tuple[float, float, list[int]]:
    """Microseconds a piece, p50 and p99, and how many characters are held after each. Checks the ids."""
    best = [float("inf")] * len(deltas)
    for _ in range(passes):
        if not is_warm:
            retokenizer.forget()
        held, lags, token_ids = HeldText(), [], []
        for index, delta in enumerate(deltas):
            start = time.perf_counter()
            fed = retokenizer.feed(held, delta)
            best[index] = min(best[index], (time.perf_counter() - start) * 1e6)
            held = fed.held
            token_ids += fed.token_ids  # fed to the model, each of them once
            lags.append(len(held.text))
        token_ids += retokenizer.feed(held, "", is_final=True).token_ids
    assert token_ids == tokenizer.encode_text("".join(deltas)), "not the ids of the whole text"
    cuts = quantiles(best, n=100)
    return cuts[49], cuts[98], lags


def provisional(tokenizer: Tokenizer, deltas: list[str]) -> int:
    """Tokens that are fed if each piece's are at once and those that it changes are rolled back first."""
    fed, before, text = 0, [], ""
    for delta in deltas:
        text += delta
        after = tokenizer.encode_text(text)
        same = next(
            (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None
        )
        fed += len(after) - (min(len(before), len(after)) if same is None else same)
        before = after
    return fed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not vocabulary.write_tokenizer_files(Path(folder), 8192):
            raise SystemExit("the vocabulary is missing: pip install dashscope")
        tokenizer = Tokenizer.from_dir(Path(folder))
    start = time.perf_counter()
    retokenizer = Retokenizer(tokenizer)
    print(f"made in {time.perf_counter() - start:.2f} s\n")
    gc.disable()
    print(
        "| text | characters a piece | us new, p50 / p99 | warm | characters held, mean / most | provisional extra |"
    )
    print("|---|---|---|---|---|---|")
    for name, text in texts().items():
        retokenizer.feed(HeldText(), text, is_final=True)  # the classes of its characters
        for label, size in SIZES.items():
            deltas = pieces(text, size)
            new, warm = (
                measure(tokenizer, retokenizer, deltas, options.passes, is_warm=is_warm)
                for is_warm in (False, True)
            )
            extra = provisional(tokenizer, deltas) / len(tokenizer.encode_text(text)) - 1
            lags = warm[2]
            print(
                f"| {name} | {label} | {new[0]:.1f} / {new[1]:.1f} | {warm[0]:.1f} / {warm[1]:.1f} "
                f"| {sum(lags) / len(lags):.1f} / {max(lags)} | {extra:.0%} |"
            )


if __name__ == "__main__":
    main()
