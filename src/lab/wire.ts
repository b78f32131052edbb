/** Records the wire between the nodes with tcpdump. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Ground } from './ground.js';
import { WIRE } from './network.js';
import { LabProcess } from './process.js';
import { sleep, waitFor } from './wait.js';

/** A running recording. */
export class WireRecording {
  readonly file: string;
  readonly #process: LabProcess;

  private constructor(file: string, process: LabProcess) {
    this.file = file;
    this.#process = process;
  }

  /**
   * Starts to record whole packets; resolves when packets are being captured.
   * @param packetBytes what is kept of each packet; the default is all of it
   */
  static async start(ground: Ground, name: string, packetBytes = 262144): Promise<WireRecording> {
    const file = join(ground.directory, 'logs', `${name}.pcap`);
    const place = { netns: ground.netnsPath('node1'), cgroup: ground.subgroup('tools') };
    const argv = ['tcpdump', '-i', WIRE, '-s', `${packetBytes}`, '-B', '65536', '-n', '-U', '-w', '-'];
    const log = join(ground.directory, 'logs', `${name}.tcpdump.log`);
    const recorder = await LabProcess.start(name, place, argv, { log, stdout: file });
    await waitFor('tcpdump to listen', () => readFileSync(log, 'utf8').includes('listening on'), {
      hint: () => recorder.tail(),
    });
    return new WireRecording(file, recorder);
  }

  /** Ends the recording. @returns the file */
  async stop(): Promise<string> {
    // Packets wait in the kernel's ring for up to a second unless the recorder reads them.
    await sleep(1200);
    await this.#process.stop('SIGINT');
    return this.file;
  }
}
