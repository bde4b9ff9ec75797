# Sourced by the other scripts: enters the repository root and a virtual environment with the bundle installed in it.
# An active virtual environment is used as it is; otherwise .venv is made here. $1 names the extra to install, if any.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
echo "Installing into $VIRTUAL_ENV (the first time takes a few minutes)"
python -m pip install --quiet --editable ".${1:+[$1]}"
