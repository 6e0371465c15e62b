"""A stand-in for coding agents: a program by itself, which does what their documentation says of hooks.

``agent.py NAME CALLS``: CALLS is a JSON file, a list of tool calls, each a line of shell, or the path and the text of a file.
Before each call the hooks run that the user's settings of the agent NAME declare; one that ends with 2 forbids the call.  At
the end it waits for its user, as an agent does: for a line on standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMON = {"session_id": "5f0c", "transcript_path": "/nonexistent/5f0c.jsonl", "permission_mode": "default"}

# name -> settings, event, the tools for shell and for files, what runs a hook, and what else stands in its input
AGENTS = {
    "claude": (".claude/settings.json", "PreToolUse", "Bash", "Write", ["/bin/sh", "-c"], {"tool_use_id": "toolu_01"}),
    "codex": (
        ".codex/hooks.json",
        "PreToolUse",
        "Bash",
        "apply_patch",
        ["/bin/sh", "-lc"],
        {"tool_use_id": "call_1", "turn_id": "1", "model": "a model"},
    ),
    "gemini": (
        ".gemini/settings.json",
        "BeforeTool",
        "run_shell_command",
        "write_file",
        ["bash", "-c"],
        {"timestamp": "2026-11-29T12:00:00Z"},
    ),
}


def main(name: str, calls: str) -> None:
    settings, event, shell, write, runner, more = AGENTS[name]
    hooks = json.loads((Path.home() / settings).read_text())["hooks"][event]
    for call in json.loads(Path(calls).read_text()):
        if isinstance(call, str):
            tool, given = shell, {"command": call}
        elif name == "codex":
            lines = "".join(f"+{line}\n" for line in call[1].splitlines())
            tool, given = write, {"command": f"*** Begin Patch\n*** Add File: {call[0]}\n{lines}*** End Patch"}
        else:
            tool, given = write, {"file_path": os.path.abspath(call[0]), "content": call[1]}
        shown = call if isinstance(call, str) else call[0]
        print(f"{tool} {shown}", flush=True)
        asked = {**COMMON, "cwd": os.getcwd(), "hook_event_name": event, "tool_name": tool, "tool_input": given, **more}
        forbidden = False
        for group in hooks:
            for hook in group["hooks"]:
                text = json.dumps(asked, ensure_ascii=False, separators=(",", ":"))
                done = subprocess.run([*runner, hook["command"]], input=text, text=True, capture_output=True, timeout=60)
                forbidden |= done.returncode == 2
                if done.returncode or done.stdout or done.stderr:
                    print(f"the hook ended with {done.returncode}: {done.stdout}{done.stderr}", flush=True)
        if not forbidden and isinstance(call, str):
            subprocess.run(["/bin/sh", "-c", call], check=False)
        elif not forbidden:
            Path(call[0]).write_text(call[1])
    print("> ", end="", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
