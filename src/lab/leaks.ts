/** What is left behind: compares what the kernel holds before and after. */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { must } from './exec.js';
import { cgroup2Root, LABS_DIRECTORY } from './ground.js';
import { sleep } from './wait.js';

/** Names of things, by kind. */
export type Inventory = Readonly<Record<string, ReadonlySet<string>>>;

/** All that a mesh or a lab could leave: BPF objects, network namespaces, links, cgroups, lab directories. */
export async function takeInventory(): Promise<Inventory> {
  const [programs, maps, links, interfaces] = await Promise.all([
    bpfObjects('prog'),
    bpfObjects('map'),
    bpfObjects('link'),
    must(['ip', '-json', 'link', 'show']).then((text) => JSON.parse(text) as { ifname: string }[]),
  ]);
  const root = cgroup2Root();
  const cgroups = readdirSync(root, { withFileTypes: true }).filter((entry) => entry.isDirectory());
  return {
    'BPF program': programs,
    'BPF map': maps,
    'BPF link': links,
    'network interface': new Set(interfaces.map((link) => link.ifname)),
    'network namespace': new Set(list('/var/run/netns')),
    cgroup: new Set(cgroups.map((entry) => join(root, entry.name))),
    'lab directory': new Set(list(LABS_DIRECTORY)),
  };
}

/**
 * What is there now and was not before. The kernel frees BPF objects and namespaces a little after their last user ended,
 * so an answer that is not empty is asked again for up to ten seconds.
 */
export async function leftSince(before: Inventory, ours: (kind: string, name: string) => boolean): Promise<string[]> {
  for (let tries = 0; ; tries++) {
    const left: string[] = [];
    for (const [kind, names] of Object.entries(await takeInventory())) {
      for (const name of names) {
        if (!(before[kind]?.has(name) ?? false) && ours(kind, name)) left.push(`${kind} ${name}`);
      }
    }
    if (left.length === 0 || tries >= 50) return left;
    await sleep(200);
  }
}

async function bpfObjects(kind: 'prog' | 'map' | 'link'): Promise<Set<string>> {
  const text = await must(['bpftool', '-j', kind, 'list']);
  const objects = JSON.parse(text === '' ? '[]' : text) as { id: number; name?: string; type?: string }[];
  return new Set(objects.map((object) => `${object.id} ${object.name ?? object.type ?? ''}`.trim()));
}

function list(directory: string): string[] {
  return existsSync(directory) ? readdirSync(directory) : [];
}
