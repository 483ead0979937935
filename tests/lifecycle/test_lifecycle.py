"""Every method through every verb: what holds of one method holds of all, those from outside the package too."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import lifecycle_cases as cases
import peft
import processes
import pytest
import tiny
import torch
import transformers as hf
from lifecycle_cases import METHODS, base, compiled, output, trained, weights, with_weights

import sparsify
from sparsify import AdapterError, Plan
from sparsify.modules.adapted import AdaptedMixin
from sparsify.passes.verify import verify

CLOSE: dict[str, float] = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


#: for verbs whose time is PyTorch's: the newest way in, and the others among the slow tests
ONE = [name if name == "DoRA" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def test_compile_keeps_the_function_and_trains_only_the_parts(name):
    host = compiled(name)
    torch.testing.assert_close(output(host), output(base(name)), **CLOSE)
    assert set(trained(host)) == {n for part in host.sparsify.program.parts for n in part.trained_names()}
    assert type(host) is type(base(name))
    tiny.assert_same(weights(host), base(name).state_dict())


def test_the_plan_goes_through_json(name):
    plan = cases.plan(name)
    assert Plan.from_json(plan.to_json()) == plan


def test_every_pass_keeps_the_function_and_the_grammar(name):
    """The graph of each stage against the captured one, and the last one once more after a wrong edit."""
    host = sparsify.compile(base(name), cases.plan(name, check="numeric"), progress=False)
    program = host.sparsify.program
    torch.testing.assert_close(
        tiny.output_of(program.run_example()), tiny.output_of(host(*program.example[0], **program.example[1])), **CLOSE
    )
    wrong = program.evolve("wrong", inputs=program.inputs, graph_module=copy.deepcopy(program.graph_module))
    part = program.parts[0]
    for node in [n for n in wrong.graph.nodes if wrong.part_at(n) is part and n.target in part.operators]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        wrong.graph.erase_node(node)
    with pytest.raises(sparsify.VerifyError, match="is read by no sparsify operator"):
        verify(wrong)


def test_training_moves_the_parts_and_nothing_else(name):
    host = compiled(name)
    before, frozen = trained(host), {n: p.detach().clone() for n, p in host.named_parameters() if not p.requires_grad}
    losses = tiny.train(host, steps=4)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[n], value) for n, value in trained(host).items())
    scratch = {part.param for part in host.sparsify.program.parts if part.mixin.entries_of_weight}
    tiny.assert_same({n: p.detach() for n, p in host.named_parameters() if n in frozen and n not in scratch},
                     {n: p for n, p in frozen.items() if n not in scratch})  # fmt: skip


def test_save_and_load_give_the_trained_values_bit_for_bit(name, tmp_path):
    host, other = compiled(name, seed=3), compiled(name)
    host.sparsify.save_adapter(tmp_path)
    other.sparsify.load_adapter(tmp_path, "a")
    assert other.sparsify.set_adapter("a").trainable
    tiny.assert_same(trained(other), trained(host))
    assert torch.equal(output(other), output(host))


def fresh_process(names: list[str], tmp_path: Path) -> None:
    hosts = {name: compiled(name, seed=3) for name in names}
    for name, host in hosts.items():
        host.sparsify.save_adapter(tmp_path / name)
    here = Path(__file__).parent
    code = cases.FRESH.format(paths=[str(here), str(here.parent)], names=names, folder=str(tmp_path))
    done = processes.run_python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, host in hosts.items():
        found = torch.load(tmp_path / f"{name}.pt")
        tiny.assert_same(found["trained"], trained(host))
        torch.testing.assert_close(found["output"], output(host), rtol=1e-6, atol=1e-6)


def test_a_fresh_process_loads_a_method_from_outside(tmp_path):
    fresh_process(["DoRA"], tmp_path)


@pytest.mark.slow
def test_a_fresh_process_loads_every_method(tmp_path):
    fresh_process(list(METHODS), tmp_path)


def test_a_server_without_the_part_computes_the_same(name, tmp_path):
    host = compiled(name, seed=3)
    host.sparsify.save_adapter(tmp_path)
    torch.testing.assert_close(output(sparsify.load(base(name), tmp_path)), output(host), **CLOSE)


def test_switching_is_exact_both_ways(name):
    host = compiled(name, seed=3)
    want, start = output(host), output(compiled(name))
    host.sparsify.set_adapter(None)
    assert torch.equal(output(host), start)
    host.sparsify.set_adapter("default")
    assert torch.equal(output(host), want)


def test_a_mix_is_the_weighted_sum_of_the_weights_changes(name, tmp_path):
    host, other = compiled(name, seed=3), compiled(name, seed=4)
    first, second = weights(host), weights(other)
    other.sparsify.save_adapter(tmp_path)
    host.sparsify.load_adapter(tmp_path, "b")
    host.sparsify.set_adapter({"default": 0.75, "b": -0.5})
    start = base(name).state_dict()
    mixed = {n: t + 0.75 * (first[n] - t) - 0.5 * (second[n] - t) for n, t in start.items()}
    torch.testing.assert_close(output(host), output(with_weights(name, mixed)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights(host), mixed, rtol=1e-4, atol=1e-5)
    host.sparsify.set_adapter("default")
    tiny.assert_same(weights(host), first)
    host.sparsify.set_adapter(None)
    tiny.assert_same(weights(host), start)


def test_merge_and_unmerge(name):
    host = compiled(name, seed=3)
    want, parameters = output(host), dict(host.named_parameters())
    host.sparsify.merge()
    assert not any(isinstance(module, AdaptedMixin) for module in host.modules())
    torch.testing.assert_close(output(host), want, **CLOSE)
    host.sparsify.unmerge()
    assert torch.equal(output(host), want)
    assert all(p is parameters[n] for n, p in host.named_parameters()), "an optimizer goes on"


def test_restore_is_the_base_bit_for_bit(name):
    host = compiled(name, seed=3)
    host.sparsify.merge()
    host.sparsify.restore()
    tiny.assert_same(host.state_dict(), base(name).state_dict())
    assert [type(m) for m in host.modules()] == [type(m) for m in base(name).modules()]


def test_a_plain_copy_holds_what_trained(name):
    host = compiled(name, seed=3)
    plain = host.sparsify.plain()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base(name).modules()]
    torch.testing.assert_close(output(plain), output(host), **CLOSE)
    assert float((output(plain) - output(base(name))).abs().max()) > 1e-3


def test_export_for_peft_is_exact_or_refused_with_a_reason(name, tmp_path):
    host, case = compiled(name, seed=3), METHODS[name]
    if case.refusal:
        with pytest.raises(AdapterError, match=case.refusal):
            host.sparsify.export_lora(tmp_path)
        return
    host.sparsify.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base(name)), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(host), **CLOSE)
    torch.testing.assert_close(output(theirs.merge_and_unload()), output(host), **CLOSE)


def test_state_dicts_go_round(name):
    host, other = compiled(name, seed=3), compiled(name)
    other.load_state_dict(host.state_dict())
    assert torch.equal(output(other), output(host))
    state = host.sparsify.original_state_dict()
    assert list(state) == list(base(name).state_dict())
    torch.testing.assert_close(output(with_weights(name, state)), output(host), **CLOSE)


def test_a_merged_host_loads_the_state_of_another(name):
    host, other = compiled(name, seed=3), compiled(name, seed=4)
    host.sparsify.merge()
    other.sparsify.merge()
    other.load_state_dict(host.state_dict())
    assert torch.equal(output(other), output(host))


def test_a_checkpoint_of_transformers_resumes_and_opens_plainly(name, tmp_path):
    host = compiled(name, seed=3)
    host.save_pretrained(tmp_path / "plain")
    plain = type(host).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(output(plain.eval()), output(host), **CLOSE)


def test_a_deep_copy_trains_apart(name):
    host = compiled(name, seed=3)
    twin, want = copy.deepcopy(host), output(host)
    tiny.train(twin, steps=1)
    assert torch.equal(output(host), want)
    twin.sparsify.set_adapter(None)
    assert torch.equal(output(host), want)
    assert torch.equal(output(twin), output(compiled(name)))


def gradients(host: Any) -> dict[str, torch.Tensor]:
    host.train()
    tiny.probe_loss(host(**tiny.inputs_of(host))).backward()
    return {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    host, other = compiled(name, seed=3), compiled(name, seed=3)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    torch.testing.assert_close(gradients(other), gradients(host), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_compiles_and_gives_the_same_gradients(name, backend):
    host, other = compiled(name, seed=3), compiled(name, seed=3)
    torch._dynamo.reset()
    other.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(gradients(other), gradients(host), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_what_trains_in_full_precision(name):
    host = compiled(name, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(host)
    want = gradients(compiled(name, seed=3))
    assert set(found) == set(want)
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - want[key]).norm() / want[key].norm()) < 0.2, key


def test_report_text_and_picture_speak_of_every_part(name, tmp_path):
    host = compiled(name)
    report, program = str(host.sparsify.report), host.sparsify.program
    assert f"trainable  {sum(t.numel() for t in trained(host).values()):,} of" in report
    text = str(program)
    for part in program.parts:
        assert part.owner in report
        assert f"@{part.param}" in text
        assert part.text() in text
    operators = {str(op._schema.name).replace("::", ".") for part in program.parts for op in part.operators}
    lines = [
        line
        for line in text.splitlines()
        if line.lstrip().startswith("»") and any(f"= {op}(" in line for op in operators)
    ]
    tied = sum(len(program.names_of(part.param)) for part in program.parts)  # one operator in each of its modules
    assert len(lines) == tied
    program.svg(str(tmp_path / "program.svg"))
    assert f"{host.sparsify.count_parameters()[0]:,} of" in "".join(
        ET.parse(tmp_path / "program.svg").getroot().itertext()
    )


class Rows(torch.utils.data.Dataset):
    """Eight rows of tokens; labels are the tokens."""

    def __init__(self) -> None:
        self.x = tiny.tokens(8, 8)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[i], "labels": self.x[i]}


def with_trainer(name: str, folder: Path, resume: Path | None = None) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3, "logging_steps": 1}
    host = compiled(name)
    trainer = hf.Trainer(
        model=host, args=hf.TrainingArguments(output_dir=str(folder), **settings), train_dataset=Rows()
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return host


def test_trainer_trains_and_resumes_exactly(name, tmp_path):
    host = with_trainer(name, tmp_path / "one")
    again = with_trainer(name, tmp_path / "two", tmp_path / "one" / "checkpoint-2")
    tiny.assert_same(trained(again), trained(host))
    start = trained(compiled(name))
    assert all(not torch.equal(start[n], value) for n, value in trained(host).items())
