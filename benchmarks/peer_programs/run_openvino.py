"""OpenVINO: its stateful model, without tokenizer and sampler. Formats: int8 and int4, by NNCF."""

import numpy
from common import THREADS, Generate, Task, main


def prepare(task: Task) -> None:
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    config = OVWeightQuantizationConfig(
        bits=int(task.format[3:]), **({"group_size": 128} if task.format == "int4" else {})
    )
    OVModelForCausalLM.from_pretrained(task.model, export=True, quantization_config=config).save_pretrained(task.work)
    converted = convert_tokenizer(AutoTokenizer.from_pretrained(task.model), with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), converted, strict=True):
        save_model(part, task.work / f"openvino_{name}.xml")


def load(task: Task) -> Generate:
    import openvino

    core = openvino.Core()
    network = core.read_model(task.work / "openvino_model.xml")
    only_the_last_logits(network)
    compiled = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    names = {name for given in compiled.inputs for name in given.names}

    def generate(prompts, steps):
        request.reset_state()
        ids, past = numpy.array(prompts), 0
        for _ in range(steps + 1):
            batch, new = ids.shape
            inputs = {
                "input_ids": ids,
                "attention_mask": numpy.ones((batch, past + new), numpy.int64),
                "position_ids": numpy.broadcast_to(numpy.arange(past, past + new), ids.shape),
                "beam_idx": numpy.arange(batch, dtype=numpy.int32),
            }
            request.infer({name: value for name, value in inputs.items() if name in names})
            ids = request.get_output_tensor(0).data[:, -1].argmax(-1)[:, None]
            past += new
            yield

    return generate


def only_the_last_logits(network) -> None:
    """Slices what the head multiplies, as OpenVINO GenAI does when it loads a model."""
    from openvino import opset13 as ops

    head = network.get_results()[0]
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    begin, end, step, axis = (ops.constant([number]) for number in (-1, 2**31 - 1, 1, 1))
    last = ops.slice(head.input_value(0), begin, end, step, axis)
    head.input(0).replace_source_output(last.output(0))
    network.validate_nodes_and_infer_types()


main(load, prepare)
