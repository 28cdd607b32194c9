"""Wanda and SparseGPT against the same methods written down plainly, which the bench of one-shot pruning times."""

import sys

import bench
import bench_oneshot


def test_both_ways_give_the_same_masks_and_errors(capsys):
    bench_oneshot.check()  # which fails if they do not
    assert len(capsys.readouterr().out.splitlines()) == len(bench_oneshot.METHODS)


def test_the_bench_prints_every_form_of_a_method(capsys, monkeypatch):
    sizes = ["--layers", "1", "--hidden", "64", "--intermediate", "64", "--vocabulary", "50"]
    data = ["--samples", "2", "--length", "8", "--repeats", "1", "--methods", "magnitude", "wanda"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "oneshot", *sizes, *data])
    monkeypatch.setattr(bench_oneshot, "check", lambda: None)
    bench.main()
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows[-4:] == [["magnitude", "2"], ["wanda", "2"], ["wanda", "1"], ["wanda", "plain"]]
