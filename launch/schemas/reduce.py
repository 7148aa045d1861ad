# SPDX-License-Identifier: Apache-2.0
"""Reduces Kubernetes custom resource definitions to the JSON schemas that the tests use.

    python launch/schemas/reduce.py CRD.yaml...

Writes one file per definition beside this script: what an object of it may hold, without the
descriptions, and with every key refused that is not listed, as an API server does it that is asked
for strict validation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
KEPT = {"JobSet": "v1alpha2"} | dict.fromkeys(
    ("ClusterQueue", "LocalQueue", "ResourceFlavor"), "v1beta2"
)


def strict(schema: Any) -> Any:
    """One node of an OpenAPI schema as JSON Schema."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":  # here keys are names, not words of the schema language
            made[key] = {name: strict(part) for name, part in value.items()}
        elif key in ("enum", "required", "default"):
            made[key] = value
        elif key not in ("description", "format") and not key.startswith("x-"):
            made[key] = strict(value)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and "additionalProperties" not in made and not open_ended:
        made["additionalProperties"] = False
    return made


def main(files: list[str]) -> None:
    """Writes the schema of each definition given."""
    for file in files:
        definition = yaml.safe_load(Path(file).read_text())["spec"]
        kind = definition["names"]["kind"]
        (version,) = (v for v in definition["versions"] if v["name"] == KEPT[kind])
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"].pop("status", None)  # the server's to write
        schema["properties"]["apiVersion"] = {"const": f"{definition['group']}/{version['name']}"}
        schema["properties"]["kind"] = {"const": kind}
        schema["properties"]["metadata"] = {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string"},
                "namespace": {"type": "string"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
        schema["required"] = ["apiVersion", "kind", "metadata", *schema.get("required", [])]
        text = json.dumps(schema, indent=0, sort_keys=True, separators=(",", ":"))
        (FOLDER / f"{kind}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
