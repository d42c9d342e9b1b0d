# A machine within this one, for tests/test_jetson_units.py: first process of its own process, mount, cgroup and host name
# namespaces. install.sh sets it up for real, on overlays that are gone with it, and systemd runs the units.
# The environment has FILES (what install.sh lies in), ARTIFACT, PROFILE, DRIVERS, OUT, CODE (this checkout), BASE (Python's
# prefix), PYTHON (the name of its program) and SITE (packages).
set -eu
mount -t tmpfs run /run
mkdir -p /run/lock /run/check
if [ "$CGROUPS" = 2 ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
else # systemd's own hierarchy only: no memory limits
    mount -t tmpfs cgroups /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
mount -t tmpfs overlays /mnt
for folder in etc var opt; do
    mkdir -p "/mnt/$folder/upper" "/mnt/$folder/work"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=/mnt/$folder/upper,workdir=/mnt/$folder/work" "/$folder"
done
hostname units-check
mkdir -p /opt/code /opt/base /opt/site /opt/out /opt/drivers
mount --bind "$CODE" /opt/code
mount --bind "$BASE" /opt/base
mount --bind "$SITE" /opt/site
mount --bind "$OUT" /opt/out
mount --bind "$DRIVERS" /opt/drivers
chmod 1777 /opt/out
for _ in 1 2; do bash "$FILES/install.sh" user service >>/opt/out/install; done
id rlrc >/opt/out/user
find /var/lib/rlrc /var/log/rlrc -maxdepth 0 -printf '%p %u %g %m\n' >/opt/out/folders
mkdir -p /run/systemd/system /opt/rlrc/venv/bin
cat >/opt/rlrc/venv/bin/rlrc <<END
#!/bin/sh
export LD_LIBRARY_PATH=/opt/base/lib PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
export PYTHONPATH=/opt/drivers:/opt/code/runtime:/opt/code/jetson:/opt/code/benchmarks:/opt/site
exec /opt/base/bin/$PYTHON -m rlrc.runtime.cli "\$@"
END
chmod 755 /opt/rlrc/venv/bin/rlrc
cp -r "$ARTIFACT" /var/lib/rlrc/current
cp "$PROFILE" /etc/rlrc/arm.toml
chown -R rlrc:rlrc /var/lib/rlrc
for name in freezes hangs stops runs; do
    echo "RLRC_ARGS=run /var/lib/rlrc/current --driver $name:open_robot --profile /etc/rlrc/arm.toml --hz 20 --late 10 --patience 10" >"/etc/rlrc/$name.env"
done
echo "RLRC_ARGS=serve /var/lib/rlrc/current --port 0" >/etc/rlrc/serves.env
# Only these units: those of the distribution would set up this machine again.
for target in sysinit basic shutdown multi-user; do printf '[Unit]\nDefaultDependencies=no\n' >"/run/check/$target.target"; done
cp /etc/systemd/system/rlrc-*@.service /run/check/
sed -i 's#^StandardOutput=.*#StandardOutput=append:/opt/out/%i.out#; s#^StandardError=.*#StandardError=append:/opt/out/%i.err#; /^ProtectSystem=/a ReadWritePaths=/opt/out' /run/check/rlrc-*@.service
printf '[Unit]\nDefaultDependencies=no\nWants=rlrc-run@freezes.service rlrc-run@hangs.service rlrc-run@stops.service rlrc-run@runs.service rlrc-serve@serves.service\n' >/run/check/check.target
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=check SYSTEMD_UNIT_PATH=/run/check SYSTEMD_LOG_TARGET=null \
    /lib/systemd/systemd --system --unit=check.target --show-status=no
