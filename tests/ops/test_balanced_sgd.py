"""The linear classifier's SGD against a plain loop, torch's own modules, and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from selfsup_ray.ops.balanced_sgd import (
    BalancedSampler,
    Rate,
    evaluated_at,
    train_balanced,
)

C, DIM = 4, 5


def unequal_classes(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    classes = np.concatenate([np.arange(C), rng.choice(C, n - C, p=[0.7, 0.2, 0.05, 0.05])])
    rows = np.eye(C, DIM)[classes] + rng.normal(size=(n, DIM))
    return rows.astype(np.float32), classes


def test_every_class_is_drawn_alike_and_every_image_of_a_class_too():
    _, classes = unequal_classes()
    sampler = BalancedSampler(classes, num_classes=C, batch_size=50, seed=(3,))
    drawn = sampler.draw(2000).ravel()
    shares = np.bincount(classes[drawn], minlength=C) / len(drawn)
    np.testing.assert_allclose(shares, 0.25, atol=0.01)
    images = np.bincount(drawn, minlength=len(classes))
    for c in range(C):
        counts = images[classes == c]
        np.testing.assert_allclose(counts / counts.sum(), 1 / len(counts), atol=0.01)


def test_batches_are_a_function_of_the_seed_alone():
    _, classes = unequal_classes()
    one, two, other = (
        BalancedSampler(classes, num_classes=C, batch_size=8, seed=(1, seed)) for seed in (1, 1, 2)
    )
    first = one.draw(30)
    np.testing.assert_array_equal(first, two.draw(30))
    assert (first != other.draw(30)).any()


@pytest.mark.parametrize("batch_size", [3, 16])
def test_steps_are_those_of_torchs_linear_layer_and_sgd(batch_size: int):
    rows, classes = unequal_classes()
    rates = [Rate(0.1, 0.0), Rate(0.5, 0.1), Rate(0.02, 1.0)]
    found = train_balanced(
        rows,
        classes,
        rates,
        num_classes=C,
        batch_size=batch_size,
        iterations=25,
        eval_every=25,
        seed=(7,),
    )
    (state,) = found
    sampler = BalancedSampler(classes, num_classes=C, batch_size=batch_size, seed=(7,))
    batches = torch.from_numpy(sampler.draw(25))
    for g, rate in enumerate(rates):
        layer = torch.nn.Linear(DIM, C)
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        sgd = torch.optim.SGD(layer.parameters(), lr=rate.lr, weight_decay=rate.weight_decay)
        for batch in batches:
            x, y = torch.from_numpy(rows)[batch], torch.from_numpy(classes)[batch]
            sgd.zero_grad()
            torch.nn.functional.nll_loss(layer(x).log_softmax(dim=1), y).backward()
            sgd.step()
        torch.testing.assert_close(state.weight[:, g], layer.weight.detach().T)
        torch.testing.assert_close(state.bias[g], layer.bias.detach())
        log_p = torch.cat(list(state.log_probabilities(rows)))[:, g]
        torch.testing.assert_close(log_p, layer(torch.from_numpy(rows)).log_softmax(1).detach())


def test_a_long_run_ends_at_scikit_learns_solution():
    rows, classes = unequal_classes(200)
    decay = 0.1
    found = train_balanced(
        rows,
        classes,
        [Rate(0.02, decay)],
        num_classes=C,
        batch_size=256,
        iterations=4000,
        eval_every=4000,
        seed=(1,),
    )
    (state,) = found
    # Weight decay on the bias too: a constant feature in place of the intercept.
    padded = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    counts = np.bincount(classes)
    weights = 1 / (C * counts[classes])
    model = LogisticRegression(C=1 / decay, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(padded, classes, sample_weight=weights)
    table = np.concatenate([state.weight[:, 0].numpy(), state.bias.numpy()])
    np.testing.assert_allclose(table, model.coef_.T, atol=0.03)
    assert np.abs(model.coef_).max() > 0.5


def test_states_come_at_the_evaluations_and_do_not_depend_on_their_number():
    rows, classes = unequal_classes()
    settings = {"num_classes": C, "batch_size": 4, "iterations": 23, "seed": (1,)}
    steps, last = [], {}
    for every in (5, 23):
        for state in train_balanced(rows, classes, [Rate(0.1, 0)], eval_every=every, **settings):
            steps.append(state.iteration)
            last[every] = state.weight.clone()
    assert steps == [5, 10, 15, 20, 23, 23]
    assert evaluated_at(23, 5) == [5, 10, 15, 20, 23]
    assert evaluated_at(20, 5) == [5, 10, 15, 20]
    torch.testing.assert_close(last[5], last[23], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_the_same_steps():
    rows, classes = unequal_classes()
    settings = {"num_classes": C, "batch_size": 16, "iterations": 40, "eval_every": 40}
    rates = [Rate(0.1, 0.0), Rate(0.5, 0.1)]
    (here,) = train_balanced(rows, classes, rates, seed=(1,), **settings)
    (there,) = train_balanced(rows, classes, rates, seed=(1,), device="cuda", **settings)
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-4, atol=1e-5)
