"""Benchmarks: each compares with a peer in the same run; a peer that is not installed is skipped
with a word.

    python tests/bench.py grader        # reward.py beside math-verify (pip install math-verify)
"""
import os
import platform
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]


def cpu():
    """The CPU's name, to stand beside every figure."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def last_number(output, gold):
    """The grader of many scripts: the last number of the output, compared as a float."""
    numbers = re.findall(r"-?\d+\.?\d*", output)
    try:
        return bool(numbers) and float(numbers[-1]) == float(gold)
    except ValueError:
        return False


def grader():
    """Accuracy, wrong answers paid and time on the number and math cases of data/answers.txt.

    reward.py was written against this table: its own row is a regression figure, not an estimate.
    """
    import reward
    from test_reward import CASES
    cases = [case for case in CASES if case[1] in ("number", "math")]
    graders = {"reward.py": reward.is_correct,
               "last number, float ==": lambda output, gold, kind: last_number(output, gold)}
    try:
        from math_verify import parse, verify
        graders["math-verify"] = lambda output, gold, kind: verify(parse(f"${gold}$"),
                                                                   parse(output))
    except ImportError:
        print("math-verify is not installed (pip install math-verify): skipped")
    print(f"{len(cases)} cases, 1 thread, {cpu()}\n"
          f"{'grader':24}{'right':>8}{'wrong paid':>12}{'s per 1,000':>13}")
    for name, grade in graders.items():
        start = time.perf_counter()
        paid = [grade(output, gold, kind) for _, kind, gold, _, output in cases]
        seconds = (time.perf_counter() - start) / len(cases) * 1000
        marks = [mark == "+" for _, _, _, mark, _ in cases]
        right = sum(p == m for p, m in zip(paid, marks)) / len(cases)
        wrong = sum(p and not m for p, m in zip(paid, marks))
        print(f"{name:24}{right:8.1%}{wrong:12}{seconds:13.3f}")


if __name__ == "__main__":
    benchmarks = {"grader": grader}
    chosen = sys.argv[1:] or list(benchmarks)
    if not set(chosen) <= set(benchmarks):
        sys.exit(f"error: no such benchmark; choose from {', '.join(benchmarks)}")
    for name in chosen:
        benchmarks[name]()
