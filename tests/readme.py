"""Run the README's shell commands, in order, as a reader would (blocks fenced with `bash`), but for those named as arguments."""
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
blocks = re.findall(r"```bash\n(.*?)```", (root/"README.md").read_text(encoding="utf8"), re.S)
commands = [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]
if unknown := set(sys.argv[1:]) - set(commands): sys.exit(f"not in the README: {', '.join(unknown)}")
commands = [c for c in commands if c not in sys.argv[1:]]
failed = 0
for command in commands:
    print(f"$ {command}", flush=True)
    if subprocess.run(command, shell=True, cwd=root, stdin=subprocess.DEVNULL).returncode:
        print(f"README command failed: {command}", file=sys.stderr)
        failed += 1
print(f"{len(commands) - failed} passed, {failed} failed")
sys.exit(failed > 0 or not commands)
