#!/bin/bash
# Prepares one TPU host; what is there already stays. Called with what launch/gcloud.py gives it.
set -euo pipefail
trap 'echo "ERROR: setup.sh, line $LINENO: $BASH_COMMAND" >&2' ERR  # the launcher shows such lines
url=$1 version=$2 bucket=$3 mount=$4 python=$5 uv=$6

# The bucket as a folder: https://cloud.google.com/storage/docs/cloud-storage-fuse/install
# Machines may come with one that is too old to know the flags.
if ! gcsfuse --help 2> /dev/null | grep -e --metadata-cache-negative-ttl-secs > /dev/null; then
  list="deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt"
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
  echo "$list gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo apt-get -o DPkg::Lock::Timeout=600 install -q -y gcsfuse
fi
if ! mountpoint -q "$mount"; then  # root may not look into a mounted one: only its own user may
  sudo umount -l "$mount" 2> /dev/null || true  # what is left of a gcsfuse that was killed
  sudo mkdir -p "$mount"
  sudo chown "$(id -u)" "$mount"
  # By default folders cannot be renamed, as a checkpoint's is in the end, and what other hosts write is seen
  # late, on some machine types never. launch/manifests.py says the same for Kubernetes.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=5 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$mount"
fi

# The code and its environment, in a folder of their own for each version.
folder=$HOME/lskd/$version
[ -e "$folder/ready" ] && exit 0
mkdir -p "$folder/code"
gcloud storage cp "$url/code.tar.gz" "$url/requirements.lock" "$folder/"
tar -xzf "$folder/code.tar.gz" -C "$folder/code"
python3 -m pip install --quiet --user "uv==$uv"
uv=$(python3 -m site --user-base)/bin/uv
"$uv" venv --quiet --clear --python "$python" "$folder/venv"
"$uv" pip install --quiet --python "$folder/venv/bin/python" --no-deps -r "$folder/requirements.lock"
"$uv" pip install --quiet --python "$folder/venv/bin/python" --no-deps "$folder/code"
touch "$folder/ready"
