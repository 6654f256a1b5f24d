// npm's `consul` package, unmodified, with a token: node npm_consul_acl.cjs HOST:PORT TOKEN
// The token may write keys below npm/ and register npm-web, and nothing else.
"use strict";
const assert = require("node:assert");
const Consul = require("consul");

const [host, port] = process.argv[2].split(":");
const at = (token) => new Consul({ host, port: Number(port), defaults: token ? { token } : {} });
const says = (words) => (error) => error.response.statusCode === 403 && words.test(error.response.body);
const denied = says(/^Permission denied/);

(async () => {
  const consul = at(process.argv[3]);
  assert.equal(await consul.kv.set("npm/a", "1"), true);
  assert.equal((await consul.kv.get("npm/a")).Value, "1");
  assert.deepEqual(await consul.kv.keys("npm/"), ["npm/a"]);
  await assert.rejects(consul.kv.set("other/a", "1"), denied);
  await assert.rejects(at().kv.get("npm/a"), denied);
  await assert.rejects(at("no-such-token").kv.get("npm/a"), says(/^ACL not found$/));
  await consul.agent.service.register({ name: "npm-web", port: 81 });
  await assert.rejects(consul.agent.service.register({ name: "other", port: 81 }), denied);
  assert.deepEqual(Object.keys(await consul.catalog.service.list()), ["npm-web"]);
  assert.equal((await consul.health.service("npm-web")).length, 1);
  assert.deepEqual(await at().health.service("npm-web"), []);
  await assert.rejects(consul.agent.self(), denied);
  await assert.rejects(consul.acl.bootstrap(), says(/ACL bootstrap no longer allowed/));
  assert.match(await at().status.leader(), /^127\.0\.0\.1:\d+$/);
  await consul.agent.service.deregister("npm-web");
  console.log("done");
})();
