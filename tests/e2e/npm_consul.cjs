// npm's `consul` package, unmodified, against an agent: node npm_consul.cjs HOST:PORT
// Prints one line a step; reads until a line comes on stdin, then tells how that went.
"use strict";
const assert = require("node:assert");
const readline = require("node:readline");
const Consul = require("consul");

const [host, port] = process.argv[2].split(":");
const consul = new Consul({ host, port: Number(port) });
const say = (word, value) => console.log(word, JSON.stringify(value));

// The client gives undefined where the body says false.
async function families() {
  assert.match(await consul.status.leader(), /^127\.0\.0\.1:\d+$/);
  assert.equal((await consul.status.peers()).length, 3);
  assert.equal((await consul.agent.members()).length, 5);
  assert.ok((await consul.agent.self()).Config.NodeName);

  await consul.agent.service.register({
    name: "npm-web", id: "npm-web-1", port: 81, tags: ["a"], meta: { v: "1" }, check: { ttl: "30s" },
  });
  assert.deepEqual(await consul.health.service({ service: "npm-web", passing: true }), []);
  await consul.agent.check.pass("service:npm-web-1");
  const [entry] = await consul.health.service({ service: "npm-web", passing: true });
  assert.equal(entry.Service.ID, "npm-web-1");
  assert.deepEqual(entry.Service.Tags, ["a"]);
  assert.equal((await consul.health.checks("npm-web"))[0].Status, "passing");
  assert.deepEqual((await consul.catalog.service.list())["npm-web"], ["a"]);
  assert.equal((await consul.catalog.service.nodes("npm-web"))[0].ServicePort, 81);
  assert.equal((await consul.catalog.node.list()).length, 5);
  assert.deepEqual(await consul.catalog.datacenters(), ["dc1"]);
  await consul.agent.service.maintenance({ id: "npm-web-1", enable: true, reason: "tea" });
  await consul.agent.service.maintenance({ id: "npm-web-1", enable: false });
  assert.ok((await consul.agent.services())["npm-web-1"]);
  await consul.agent.service.deregister("npm-web-1");

  assert.equal(await consul.kv.set("npm/a", "1"), true);
  const got = await consul.kv.get("npm/a");
  assert.equal(got.Value, "1");
  assert.equal(await consul.kv.set({ key: "npm/a", value: "2", cas: String(got.ModifyIndex) }), true);
  assert.ok(!(await consul.kv.set({ key: "npm/a", value: "3", cas: String(got.ModifyIndex) })));
  assert.deepEqual(await consul.kv.keys("npm/"), ["npm/a"]);
  assert.equal(await consul.kv.get("npm/none"), undefined);

  const one = (await consul.session.create({ name: "one", ttl: "20s" })).ID;
  const two = (await consul.session.create({ name: "two", lockdelay: "1ms" })).ID;
  assert.equal(await consul.kv.set({ key: "npm/lock", value: "one", acquire: one }), true);
  assert.ok(!(await consul.kv.set({ key: "npm/lock", value: "two", acquire: two })));
  assert.equal((await consul.session.renew(one))[0].ID, one);
  assert.equal((await consul.session.get(one)).ID, one);
  assert.ok((await consul.session.list()).length >= 2);
  assert.equal(await consul.kv.set({ key: "npm/lock", value: "", release: one }), true);
  assert.equal(await consul.kv.set({ key: "npm/lock", value: "two", acquire: two }), true);
  await consul.session.destroy(one);
  await consul.session.destroy(two);

  const done = await consul.transaction.create([
    { KV: { Verb: "set", Key: "npm/t", Value: Buffer.from("t").toString("base64") } },
    { KV: { Verb: "get", Key: "npm/a" } },
  ]);
  assert.equal(done.Results.length, 2);
  await consul.kv.del({ key: "npm/", recurse: true });
  const fired = await consul.event.fire("npm-deploy", "v2");
  assert.ok((await consul.event.list("npm-deploy")).some((event) => event.ID === fired.ID));
}

async function main() {
  await families();
  const counted = { good: 0, bad: [], wakes: 0, errors: [] };
  await consul.agent.service.register({ name: "npm-steady", port: 82 });
  const watch = consul.watch({ method: consul.health.service, options: { service: "npm-watched", wait: "60s" } });
  let last;
  watch.on("change", (rows, res) => {
    counted.wakes += 1;
    last = rows.map((row) => row.Service.Port);
    say("watched", { ports: last, index: res.headers["x-consul-index"] });
  });
  watch.on("error", (error) => counted.errors.push(String(error)));
  let going = true;
  readline.createInterface({ input: process.stdin }).on("line", (line) => {
    if (line === "count") say("counted", { good: counted.good, bad: counted.bad.length });
    else going = false;
  });
  say("ready", {});
  while (going) {
    try {
      const rows = await consul.health.service({ service: "npm-steady", passing: true, stale: counted.good % 2 === 1 });
      if (rows.length === 1 && rows[0].Service.Port === 82) counted.good += 1;
      else counted.bad.push(JSON.stringify(rows));
    } catch (error) {
      counted.bad.push(String(error));
    }
  }
  watch.end();
  say("ended", counted);
  process.exit(0);
}

main().catch((error) => {
  console.log("failed", error.stack);
  process.exit(1);
});
