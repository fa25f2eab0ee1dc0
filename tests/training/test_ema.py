"""Averages of the weights: the power function's profile, and averages of any width from stored snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import integrate
from small_runs import full_disk, small_run

from dic_repa.cli.ema import command
from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.runs.checkpoints import read_run_id
from dic_repa.training import PowerEMA
from dic_repa.training.ema import sigma_rel_to_gamma
from dic_repa.training.posthoc import combination, list_snapshots, profile_products, reconstruct, save_reconstruction


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_widths_are_those_of_the_profile():
    """sigma_rel is the standard deviation of the time under p(tau) = (gamma + 1) tau^gamma on [0, 1]."""
    for gamma in (0.5, 6.94, 16.97, 100.0):

        def moment(k, gamma=gamma):
            return integrate.quad(lambda tau: (gamma + 1) * tau ** (gamma + k), 0, 1)[0]

        deviation = np.sqrt(moment(2) - moment(1) ** 2)
        assert sigma_rel_to_gamma(deviation) == pytest.approx(gamma, rel=1e-5)
    # The two widths that the paper keeps, and their gammas as it states them.
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    with pytest.raises(UserError, match="sigma_rel lies above 0"):
        sigma_rel_to_gamma(0.5)


def run_average(sigma_rel, weights):
    """The averages after each step, by the recurrence, of a model with one weight."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema, after = PowerEMA(model, sigma_rel), []
    ema.model.double()
    for step, weight in enumerate(weights, 1):
        model.weight.data.fill_(weight)
        ema.update(model, step)
        after.append(ema.model.weight.item())
    return np.array(after)


def test_recurrence_has_the_profile_of_the_power_function():
    """The weight of step k after t of them is the integral of the profile over [k - 1, k]: (k^g - (k-1)^g) / t^g, with
    g = gamma + 1.
    """
    weights = np.random.default_rng(0).normal(size=50)
    exponent, k = sigma_rel_to_gamma(0.1) + 1, np.arange(1, 51)
    expected = (((k / 50) ** exponent - ((k - 1) / 50) ** exponent) * weights).sum()
    assert run_average(0.1, weights)[-1] == pytest.approx(expected, rel=1e-9)


def test_products_of_profiles_are_their_integrals():
    for ta, ga, tb, gb in ((10, 3.0, 25, 7.5), (8, 0.0, 8, 2.0), (1000, 16.97, 600, 6.94)):
        expected, _ = integrate.quad(
            lambda tau, a=(ta, ga), b=(tb, gb): np.prod([(g + 1) / t * (tau / t) ** g for t, g in (a, b)]),
            0,
            min(ta, tb),
        )
        assert profile_products([ta], [ga], [tb], [gb])[0, 0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("target", [0.07, 0.12, 0.15])
def test_combination_of_snapshots_is_the_average_that_was_never_run(target):
    """Weights that drift as those of a training do, 400 steps, snapshots of two widths every 20."""
    rng, steps = np.random.default_rng(1), 400
    weights = np.exp(-np.arange(1, steps + 1) / 150) + 0.02 * rng.normal(size=steps)
    stored = {width: run_average(width, weights) for width in (0.05, 0.10)}
    at = [(step, width) for step in range(20, steps + 1, 20) for width in stored]
    gammas = [sigma_rel_to_gamma(width) for _, width in at]
    values = np.array([stored[width][step - 1] for step, width in at])
    for step in (300, 400):
        upto = [i for i, (s, _) in enumerate(at) if s <= step]
        factors = combination([at[i][0] for i in upto], [gammas[i] for i in upto], step, sigma_rel_to_gamma(target))
        direct = run_average(target, weights)[step - 1]
        farthest = max(abs(stored[width][step - 1] - direct) for width in stored)
        assert abs(factors @ values[upto] - direct) < 0.1 * farthest


def test_combination_for_a_stored_width_is_the_snapshot():
    gammas = [sigma_rel_to_gamma(width) for width in (0.05, 0.1)]
    factors = combination([10, 10, 20, 20], gammas * 2, 20, gammas[1])
    np.testing.assert_allclose(factors, [0, 0, 0, 1], atol=1e-6)


@pytest.mark.slow
def test_verb_makes_the_average_that_another_run_kept(tmp_path, mistake, capsys):
    """One run stores snapshots of two widths; the other keeps a third width as it goes. Same seed, same weights."""
    stored = small_run(
        tmp_path / "stored",
        "train.steps=24",
        "train.checkpoint_every=12",
        "train.power_ema=[0.05,0.1]",
        "train.snapshot_every=2",
    )
    direct = small_run(tmp_path / "direct", "train.steps=24", "train.checkpoint_every=12", "train.power_ema=[0.08]")
    assert len(list_snapshots(stored)) == 24
    done = CliRunner().invoke(command, [str(stored.path), "--sigma-rel", "0.08", "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    made = DiC.from_pretrained(tmp_path / "made").state_dict()
    kept = DiC.from_pretrained(direct.checkpoint_path(24) / "ema-sigma_rel-0.08").state_dict()
    near = DiC.from_pretrained(stored.checkpoint_path(24) / "ema-sigma_rel-0.05").state_dict()
    error, distance = (
        torch.stack([(other[name] - kept[name]).norm() for name in kept]).norm() for other in (made, near)
    )
    assert error < 0.05 * distance
    with full_disk(), pytest.raises(UserError, match="could not be written"):
        save_reconstruction(stored, 0.08, tmp_path / "unwritten")
    assert not (tmp_path / "unwritten").exists()
    exact, step = reconstruct(stored, 0.1, 12)
    assert step == 12
    other = DiC.from_pretrained(stored.checkpoint_path(12) / "ema-sigma_rel-0.1").state_dict()
    for name, tensor in other.items():
        torch.testing.assert_close(exact[name], tensor, rtol=1e-4, atol=1e-5)
    _snapshots_are_checked(stored)
    with pytest.raises(UserError, match="has no snapshot of step 13; it has 2, 4, 6"):
        reconstruct(stored, 0.1, 13)
    none = small_run(tmp_path / "none", "train.steps=1")
    with pytest.raises(UserError, match=r"has no snapshots; train with train.power_ema"):
        reconstruct(none, 0.1)
    capsys.readouterr()
    assert "has no snapshots; train with train.power_ema" in mistake("ema", none.path)


def _snapshots_are_checked(run):
    """A bit that flips in one, and one under the name of another step; all are as they were in the end."""
    second = list_snapshots(run)[1].path
    whole = second.read_bytes()
    for content, says in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), rf"{second.name} is damaged: its tensors have changed"),
        (list_snapshots(run)[-1].path.read_bytes(), rf"{second.name} is of step 24, not of that in its name"),
        (whole.replace(read_run_id(run.path).encode(), b"0" * 32), rf"{second.name} is of another run"),
    ):
        second.write_bytes(content)
        with pytest.raises(UserError, match=says):
            reconstruct(run, 0.1)
    second.write_bytes(whole)
