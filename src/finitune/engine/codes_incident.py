"""Codes of incidents and capsules: what a capsule must not hold, and why one cannot be computed again."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

NO_CAPSULE = Code(
    "SYS410",
    Severity.ERROR,
    Text(
        "there is no capsule",
        "{path}: {reason}.",
        "A capsule is the folder incidents/NUMBER/capsule of a run, with manifest.json, capsule.json and "
        "tensors.safetensors; the same folder as a plain .tar file will do as well.",
        (
            "give the folder of the incident: finitune replay RUN/incidents/NUMBER",
            "list the incidents of a run: finitune incidents RUN",
            "pack it for somebody else: tar -cf incident.tar -C RUN/incidents/NUMBER capsule",
        ),
    ),
    Text(
        "没有胶囊",
        "{path}：{reason}。",
        "胶囊是运行目录中的 incidents/编号/capsule，内含 manifest.json、capsule.json 和 tensors.safetensors；"
        "也可以是装有该目录的普通 .tar 文件。",
        (
            "给出事件的目录：finitune replay RUN/incidents/编号",
            "列出一次运行的事件：finitune incidents RUN",
            "打包给别人：tar -cf incident.tar -C RUN/incidents/编号 capsule",
        ),
    ),
)

CAPSULE_DAMAGED = Code(
    "SYS411",
    Severity.ERROR,
    Text(
        "the capsule is damaged or was changed",
        "{path}: {faults}.",
        "Size and digest of every file are in its manifest. What does not agree with it was cut short or edited, and a "
        "replay of it would prove nothing.",
        ("copy it again from the run, as it is", "look at what was put into it, if it came from a stranger"),
    ),
    Text(
        "胶囊已损坏或被改动",
        "{path}：{faults}。",
        "清单中有每个文件的大小和摘要。与清单不符说明文件被截断或修改过，重放它不能说明任何问题。",
        ("从运行目录原样重新复制", "若来自陌生人，请检查其中的内容"),
    ),
)

CAPSULE_FOREIGN = Code(
    "SYS412",
    Severity.ERROR,
    Text(
        "the content of the capsule is not understood",
        "{path}: {field}: {problem}.",
        "Its files agree with its manifest, but what they say is not what this version writes: another version or "
        "another program made it, or it was made to do harm. Nothing of it was used.",
        ("replay it with the version that wrote it (`versions` in capsule.json)", "make it anew from the run"),
    ),
    Text(
        "无法理解胶囊的内容",
        "{path}：{field}：{problem}。",
        "文件与清单相符，但内容不是本版本写出的样子：由其他版本或其他程序生成，或是恶意构造的。没有使用其中任何内容。",
        ("用写出它的版本重放（见 capsule.json 中的 versions）", "从运行目录重新生成"),
    ),
)

CAPSULE_TENSORS = Code(
    "SYS413",
    Severity.ERROR,
    Text(
        "the tensors of the capsule are refused",
        "{path}: {problem}.",
        "The header of a safetensors file says where each tensor lies; this one does not fit the bytes that are there. "
        "It was refused before any memory was taken.",
        ("copy the capsule again from the run", "do not use it if it came from a stranger"),
    ),
    Text(
        "胶囊中的张量被拒绝",
        "{path}：{problem}。",
        "safetensors 文件的头部说明每个张量的位置；这里的头部与实际字节不符。在分配任何内存之前就已拒绝。",
        ("从运行目录重新复制胶囊", "若来自陌生人，请不要使用"),
    ),
)

CAPSULE_UNSAFE = Code(
    "SYS414",
    Severity.ERROR,
    Text(
        "the archive is refused",
        "{path}: {problem}.",
        "An archive may hold names that lead out of its folder, links, devices, or more than it seems. Only plain "
        "files of a capsule are taken from it.",
        (
            "pack the folder anew: tar -cf incident.tar -C RUN/incidents/NUMBER capsule",
            "do not use it if it came from a stranger",
        ),
    ),
    Text(
        "归档文件被拒绝",
        "{path}：{problem}。",
        "归档中可能有指向目录之外的名称、链接、设备，或比看上去更多的内容。这里只接受胶囊的普通文件。",
        ("重新打包目录：tar -cf incident.tar -C RUN/incidents/编号 capsule", "若来自陌生人，请不要使用"),
    ),
)

CANNOT_REPLAY = Code(
    "SYS415",
    Severity.ERROR,
    Text(
        "the capsule cannot be replayed here",
        "{reason}.",
        "A replay needs the batch, the weights and moments of before the step, and the model. What is missing here "
        "says nothing about the failure itself.",
        (
            "if rows were left out: write the capsule with rows=full, where the data may be passed on",
            "if weights were left out: write it with weights=lora or weights=full",
            "if the model is not here: put it where the recipe in the capsule says",
        ),
    ),
    Text(
        "胶囊无法在此重放",
        "{reason}。",
        "重放需要批次、该步之前的权重和矩，以及模型。这里缺少的东西不能说明故障本身。",
        (
            "若缺少数据行：在允许传播数据时用 rows=full 写胶囊",
            "若缺少权重：用 weights=lora 或 weights=full 写胶囊",
            "若缺少模型：把它放到胶囊中配方所写的位置",
        ),
    ),
)

NO_EXPERIMENT = Code(
    "SYS416",
    Severity.ERROR,
    Text(
        "there is no such experiment",
        "{name} is not an experiment{hint}.",
        "Experiments are the members of engine/experiments, and those that other packages register.",
        ("one of: {known}",),
    ),
    Text(
        "没有这个实验",
        "{name} 不是实验{hint}。",
        "实验是 engine/experiments 的成员，以及其他软件包注册的成员。",
        ("可选：{known}",),
    ),
)

NO_SUCH_INCIDENT = Code(
    "SYS417",
    Severity.ERROR,
    Text(
        "there is no such incident",
        "{path} has no incident {number}; it has {known}.",
        "Incidents are numbered from 1 in the order in which they happened.",
        ("list them: finitune incidents {path}",),
    ),
    Text(
        "没有这个事件",
        "{path} 中没有事件 {number}；已有：{known}。",
        "事件按发生的顺序从 1 开始编号。",
        ("列出事件：finitune incidents {path}",),
    ),
)

CAPSULE_NOT_WRITTEN = Code(
    "SYS418",
    Severity.WARNING,
    Text(
        "the capsule of an incident could not be written",
        "incident {number} at step {step}: {reason}.",
        "The run is not touched by this, and the incident is in the journal. Only the replay of it elsewhere is lost.",
        ("make room on the disk, or leave weights out of capsules",),
    ),
    Text(
        "事件的胶囊无法写入",
        "第 {step} 步的事件 {number}：{reason}。",
        "运行不受影响，事件已记入日志。失去的只是在别处重放的可能。",
        ("腾出磁盘空间，或不在胶囊中保存权重",),
    ),
)

CODES = (
    NO_CAPSULE,
    CAPSULE_DAMAGED,
    CAPSULE_FOREIGN,
    CAPSULE_TENSORS,
    CAPSULE_UNSAFE,
    CANNOT_REPLAY,
    NO_EXPERIMENT,
    NO_SUCH_INCIDENT,
    CAPSULE_NOT_WRITTEN,
)
