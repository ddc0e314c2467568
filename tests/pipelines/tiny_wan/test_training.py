"""The training of tiny-wan: the whole-clip VAE equals diffusers' chunked one, runs resume, the parts fit together."""

import itertools
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sparse_dit.pipelines.tiny_wan import training
from sparse_dit.pipelines.tiny_wan.architecture import build_pipeline, build_tokenizer, build_vae, prompt_embeddings
from sparse_dit.pipelines.tiny_wan.train_transformer import flow_loss
from sparse_dit.pipelines.tiny_wan.training import AveragedWeights, Run, learning_rate
from sparse_dit.pipelines.tiny_wan.whole_clip import WholeClipVAE


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_clip_equals_chunked(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    video = torch.rand(2, 3, frames, 32, 16) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        frames_out = vae.decode(latents).sample
        whole = WholeClipVAE(vae)
        mean, _ = whole.encode(video)
        torch.testing.assert_close(mean, latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole.decode(mean).clamp(-1, 1), frames_out, atol=1e-5, rtol=1e-5)
        assert torch.equal(whole.release().decode(latents).sample, frames_out)


def test_prompt_embeddings_are_the_pipelines() -> None:
    torch.manual_seed(0)
    pipe = build_pipeline()
    captions = [
        "a large striped red circle moving left over a dark wall",
        "",
        "the camera pans up over a photo of a cat",
    ]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=40)
        found = prompt_embeddings(pipe.tokenizer, pipe.text_encoder, captions, 40)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokenizer_knows_every_word_of_a_caption() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("a large striped red circle moving left over a dark wall").input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer("a purple elephant").input_ids.count(tokenizer.unk_token_id) == 2


def test_flow_loss_reaches_every_weight_of_transformer_and_text_encoder() -> None:
    torch.manual_seed(0)
    pipe = build_pipeline()
    embeddings = prompt_embeddings(pipe.tokenizer, pipe.text_encoder, ["a red circle", ""], 16)
    flow_loss(pipe.transformer, torch.randn(2, 16, 2, 4, 4), embeddings).backward()
    without = [name for name, p in pipe.transformer.named_parameters() if p.grad is None]
    assert without == []
    assert pipe.text_encoder.shared.weight.grad.abs().sum() > 0


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(1.0, progress / 100) for progress in range(101)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(rates[3:]))


def _run(folder: Path, seconds: float) -> tuple[Run, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = Run(folder, seconds, model, optimizer, AveragedWeights(model.parameters(), 0.9), peak_rate=0.05)
    run.resume()
    return run, model


def test_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    target = torch.tensor([[1.0, -2.0, 0.5]])

    def loss_of(step: int, progress: float) -> dict[str, Tensor]:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x @ target.T).square().mean()}

    run, model = _run(tmp_path, seconds=0.3)
    run.train(loss_of, log_every=10)
    first_steps, weights = run.step, model.weight.detach().clone()
    assert first_steps > 10
    assert (tmp_path / "log.jsonl").read_text().count("\n") == first_steps // 10

    run, model = _run(tmp_path, seconds=0.6)
    assert run.step == first_steps
    assert torch.equal(model.weight, weights)
    run.train(loss_of, log_every=10)
    assert run.step > first_steps
    run.averaged.copy_to_model()
    torch.testing.assert_close(model.weight.detach(), target, atol=0.3, rtol=0)


def test_the_average_follows_and_forgets_its_start() -> None:
    (parameter,) = parameters = [nn.Parameter(torch.zeros(()))]
    averaged = AveragedWeights(parameters, decay=0.9)
    for step, value, average in ((0, 1.0, 0.9), (10**6, 2.0, 0.9 * 0.9 + 0.1 * 2.0)):
        parameter.data.fill_(value)
        averaged.update(step)
        assert averaged.average[0].item() == pytest.approx(average)
    averaged.copy_to_model()
    assert parameter.item() == pytest.approx(1.01)


@pytest.fixture
def a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


@pytest.mark.usefixtures("a_second_a_step")
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    made: list[int] = []

    def train(folder: Path, breaks_at: int | None = None) -> Run:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1.0)
        averaged = AveragedWeights(model.parameters(), 0.9)
        run = Run(folder, 20.0, model, optimizer, averaged, peak_rate=0.05, checkpoint_every=3.0)

        def loss_of(step: int, progress: float) -> dict[str, Tensor]:
            assert progress == pytest.approx(step / 20)
            made.append(step)
            if step == breaks_at:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return {"loss": (model(x) - 1).square().mean()}

        run.resume()
        run.train(loss_of)
        return run

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", breaks_at=10)
    made.clear()
    again = train(tmp_path / "broken")
    assert made == list(range(8, 20)), "more than 3 seconds lay between checkpoints: 4, then 4 again"
    assert again.step == whole.step == 20
    assert torch.equal(again.model.weight, whole.model.weight)
    assert all(torch.equal(*pair) for pair in zip(again.averaged.average, whole.averaged.average, strict=True))


@pytest.mark.usefixtures("a_second_a_step")
def test_a_step_is_as_long_as_the_rate_and_the_factor_of_its_group_whatever_the_gradient(tmp_path: Path) -> None:
    first, second = (nn.Parameter(torch.zeros(())) for _ in range(2))
    model = nn.ParameterList([first, second])
    groups = [{"params": [first]}, {"params": [second], "rate_factor": 0.5}]
    run = Run(tmp_path, 10.0, model, torch.optim.SGD(groups, lr=9.0), AveragedWeights(model, 0.9), peak_rate=0.1)
    run.resume()
    run.train(lambda step, progress: {"loss": 300.0 * first + 400.0 * second})
    rates = sum(learning_rate(0.1, step / 10) for step in range(10))
    assert first.item() == pytest.approx(-0.6 * rates, rel=1e-4)
    assert second.item() == pytest.approx(-0.8 * 0.5 * rates, rel=1e-4)


def test_a_checkpoint_that_was_not_written_whole_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    run, _ = _run(tmp_path, seconds=1.0)
    run.step = 7
    run.save()

    def half(what: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="full"):
        run.save()
    assert _run(tmp_path, seconds=1.0)[0].step == 7
