#!/usr/bin/env bash
# MONAI Label on this machine alone, with the bundle's three faces: docs/monailabel.md.
#   monailabel.sh install                       makes its virtual environment
#   monailabel.sh start STUDIES [--checkpoint FILE] [--config FILE]...
#   monailabel.sh stop
# MONAILABEL_DIR (.monailabel) holds the app, the log and the environment, MONAILABEL_ENV may name another environment,
# MONAILABEL_PORT (8000) is the port on 127.0.0.1.
set -euo pipefail
called_from=$PWD
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
dir=$(realpath -m "${MONAILABEL_DIR:-.monailabel}")
env=$(realpath -ms "${MONAILABEL_ENV:-$dir/env}")
port=${MONAILABEL_PORT:-8000}
app=$dir/apps/monaibundle
faces=chest_ct_segmentation,chest_ct_classification,chest_ct_detection

is_installed() { "$env/bin/python" -c "import monailabel.app" >/dev/null 2>&1; }

install() {
    if is_installed; then return; fi
    # What the bundle needs is taken from its own environment; only MONAI Label and its pydicom 2 are installed beside it.
    base=${VIRTUAL_ENV:-$root/.venv}
    "$base/bin/python" -c "import monai, timm, torchvision" 2>/dev/null || { . scripts/environment.sh; base=$VIRTUAL_ENV; }
    "$base/bin/python" -m venv "$env"
    "$base/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
        >"$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/bundle_environment.pth"
    echo "Installing MONAI Label into $env"
    # Without their dependencies: they ask for numpy 1 and for packages of models that are not used here.
    "$env/bin/python" -m pip install --quiet --no-deps monailabel==0.8.5 pydicom-seg==0.4.1 timeloop==1.0.2
    "$env/bin/python" -m pip install --quiet 'pydicom<3' 'pynetdicom<3' 'dicomweb-client[gcp]<0.60' uvicorn pydantic \
        pydantic-settings python-dotenv fastapi python-multipart httpx schedule expiringdict expiring-dict cachetools \
        watchdog pynrrd girder-client ninja pyyaml filelock passlib pyjwt bcrypt shapely requests requests-toolbelt \
        scikit-learn scikit-image jsonschema psutil google-auth gdown openslide-python openslide-bin
    is_installed || { "$env/bin/python" -c "import monailabel.app"; exit 1; }
}

# The server's process, if it is one: after a crash its number may belong to another program.
server() {
    pid=$(cat "$dir/server.pid" 2>/dev/null) && ps -o args= -p "$pid" | grep -q "monailabel.main start_server" && echo "$pid"
}

answers() {
    "$env/bin/python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/info/', timeout=5)" 2>/dev/null
}

start() {
    local studies options=()
    case $1 in
    http://* | https://*) studies=$1 ;; # a DICOMweb server
    *) studies=$(cd "$called_from" && realpath -e "$1") || exit 1 ;;
    esac
    shift
    for option in "$@"; do # files are named from where the command was given
        case $option in --*) ;; *) option=$(cd "$called_from" && realpath -m "$option") ;; esac
        options+=("$option")
    done
    if server >/dev/null; then echo "error: a server runs already: $0 stop" >&2 && exit 1; fi
    if answers; then echo "error: port $port is taken: set MONAILABEL_PORT" >&2 && exit 1; fi
    install
    [ -f "$app/main.py" ] || "$env/bin/python" -m monailabel.main apps --download --name monaibundle --output "$dir/apps" \
        >/dev/null
    PYTHONPATH=$root "$env/bin/python" -m bundle.monailabel "$app/model" "${options[@]}" >/dev/null
    # Any source but the default: that one is asked over the network even for local bundles.
    # No scoring unasked: its two threads share one parser, which each of them resets under the other.
    MONAI_ZOO_SOURCE=ngc MONAI_LABEL_AUTO_UPDATE_SCORING=false setsid "$env/bin/python" -m monailabel.main start_server \
        --app "$app" --studies "$studies" --conf models "$faces" --conf epistemic_model chest_ct_segmentation --conf sam2 false \
        --host 127.0.0.1 --port "$port" >"$dir/server.log" 2>&1 </dev/null &
    echo $! >"$dir/server.pid"
    for _ in $(seq 120); do
        if answers; then echo "MONAI Label: http://127.0.0.1:$port" && return; fi
        kill -0 "$(cat "$dir/server.pid")" 2>/dev/null || break
        sleep 1
    done
    echo "error: the server did not start, see $dir/server.log" >&2
    stop
    exit 1
}

stop() {
    if pid=$(server); then
        kill -- "-$pid" # with a training or scoring that runs
        for _ in $(seq 20); do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.5
        done
        kill -9 -- "-$pid" 2>/dev/null || true
    fi
    rm -f "$dir/server.pid"
}

case "${1:-} ${2:+studies}" in
"install ") install ;;
"start studies") start "${@:2}" ;;
"stop ") stop ;;
*) sed -n '3,5s/^#   /usage: /p' "$script" >&2 && exit 2 ;;
esac
