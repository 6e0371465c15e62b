#!/bin/sh
# A hook for coding agents: before a tool call, a checkpoint of the workspace in which the agent runs, unless nothing has changed
# since the last one.
#
# The agent writes the tool call to standard input, as JSON; README.md says how each agent is told to.  Outside of `snapfs run`
# this does nothing.  It says nothing, and its exit status is always 0: the tool call goes on, whatever comes of the checkpoint.
exec > /dev/null 2>&1
export LC_ALL=C

# "Bash: make test": one line without control characters, of at most 300 bytes, whatever a model has written there.
call=$({ head -c 65536; cat > /dev/null; } | tr -d '\000-\037\177' | sed -E '
    s/.*"tool_name": *"([^"]*)".*"tool_input": *\{(.*)/\1: \2/
    s/^([^:]*): .*"(command|file_path)": *"(([^"\\]|\\.)*)".*/\1: \3/' | cut -b 1-300 | iconv -c -f utf-8 -t utf-8)

test -n "$SNAPFS" && test -n "$SNAPFS_WORKSPACE" || exit 0
workspace=$SNAPFS/active/$(printf %s "$SNAPFS_WORKSPACE" | sed 's/%/%25/g; s,/,%2F,g')
last=$SNAPFS/committed/$(tail -n 1 "$workspace/checkpoint" | cut -f 2)

# What is in the layer, and when each of it changed, which no program can set.  What can't be read counts as changed.
layer=$({ find "$workspace/diff/" -printf '%P\0%i %C@\0' || date +%s%N; } | sha256sum)
test "$layer" = "$(cat "$last/labels/agent.layer")" && exit 0
test -n "$(head -c 1 "$workspace/changes" || echo unknown)" || exit 0  # as after a rollback

for words in "$call" "a tool call"; do
    {
        printf 'copy: before %s\n' "$words" >&3 || continue
        IFS= read -r name <&3
        echo "$layer" > "$SNAPFS/committed/$name/labels/agent.layer"
        break
    } 3<> "$workspace/checkpoint"
done
exit 0
