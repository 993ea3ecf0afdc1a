"""Part of a graph: what some of its outputs need. Needs onnx."""

from collections.abc import Container

from onnx import GraphProto, ModelProto


def cut(proto: ModelProto, outputs: Container[str]) -> ModelProto:
    """The graph with these of its outputs alone, and the nodes and initializers that they need, in the order
    they had; `proto` stays as it is.

    It takes the inputs that the whole graph takes, needed or not. Made of a graph that `shared.write_graphs`
    wrote, it reads its weights where that does. Nodes inside of nodes are not looked into.
    """
    graph = proto.graph
    kept = [x for x in graph.output if x.name in outputs]
    needed, nodes = {x.name for x in kept}, []
    for node in reversed(graph.node):  # a node comes after those that it needs
        if any(name in needed for name in node.output if name):
            nodes.append(node)
            needed.update(node.input)
    made = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    made.graph.CopyFrom(
        GraphProto(
            name=graph.name,
            input=graph.input,
            output=kept,
            node=reversed(nodes),
            initializer=[x for x in graph.initializer if x.name in needed],
            value_info=[x for x in graph.value_info if x.name in needed],
        )
    )
    return made
