package agent

import (
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"unsafe"

	"golang.org/x/sys/windows"
	"software.sslmate.com/src/go-pkcs12"
)

// secureDir leaves the state folder to SYSTEM and the administrators alone. ProgramData, where it usually stands,
// would pass on reading to every user.
//
// ProgramData also lets every user make folders: one who made this one first would stay its owner, who may give out rights, and
// a link of theirs would lead elsewhere.
func secureDir(dir string) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() { // a junction or another link
		return fmt.Errorf("it is a link, not a folder (%s): look who made it, and remove it", fi.Mode().Type())
	}
	sd, err := windows.SecurityDescriptorFromString("O:BAD:PAI(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)")
	if err != nil {
		return err
	}
	owner, _, err := sd.Owner()
	if err != nil {
		return err
	}
	dacl, _, err := sd.DACL()
	if err != nil {
		return err
	}
	return windows.SetNamedSecurityInfo(dir, windows.SE_FILE_OBJECT,
		windows.OWNER_SECURITY_INFORMATION|windows.DACL_SECURITY_INFORMATION|windows.PROTECTED_DACL_SECURITY_INFORMATION, owner, nil, dacl, nil)
}

// syncDir has nothing to do: NTFS journals its renames, and Windows can't flush a folder.
func syncDir(string) error { return nil }

func newInstaller(dir string) installer {
	if dir == "" {
		return listenerInstaller{}
	}
	return newDirInstaller(dir)
}

// listenerInstaller gives the certificate to the RDP-Tcp listener of Windows: into LocalMachine\My with a key that the
// listener's account (NETWORK SERVICE) may read, then its SHA-1 thumbprint into the listener's setting by WMI. New
// connections show the new certificate; sessions go on.
type listenerInstaller struct{}

// bindScript runs in Windows PowerShell, which every Windows has. Setting the listener through WMI, not the registry,
// also gives its account the right to the key. Certificates that this agent installed before are removed last.
const bindScript = `
$ErrorActionPreference = 'Stop'
$t = $env:RDV_THUMBPRINT
(Get-Item "Cert:\LocalMachine\My\$t").FriendlyName = 'Rendezvous RDP'
Get-CimInstance -Namespace root/cimv2/TerminalServices -ClassName Win32_TSGeneralSetting -Filter "TerminalName='RDP-Tcp'" |
  Set-CimInstance -Property @{ SSLCertificateSHA1Hash = $t }
Get-ChildItem Cert:\LocalMachine\My | Where-Object { $_.FriendlyName -eq 'Rendezvous RDP' -and $_.Thumbprint -ne $t } |
  Remove-Item -DeleteKey
`

func (listenerInstaller) Install(certificate, key []byte) error {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return err
	}
	if err := importPair(pair); err != nil {
		return fmt.Errorf("LocalMachine\\My: %w", err)
	}
	sum := sha1.Sum(pair.Leaf.Raw)
	cmd := exec.Command("powershell.exe", "-NoProfile", "-NonInteractive", "-Command", bindScript)
	cmd.Env = append(cmd.Environ(), "RDV_THUMBPRINT="+strings.ToUpper(hex.EncodeToString(sum[:])))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("RDP-Tcp listener: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// importPair puts the leaf with its key into LocalMachine\My and the chain into LocalMachine\CA. PKCS #12 is the form
// that Windows imports; it never leaves memory, so its password and old cipher guard nothing.
func importPair(pair tls.Certificate) error {
	var chain []*x509.Certificate
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		chain = append(chain, c)
	}
	const password = "in memory only"
	pfx, err := pkcs12.LegacyDES.Encode(pair.PrivateKey, pair.Leaf, chain, password)
	if err != nil {
		return err
	}
	secret, err := windows.UTF16PtrFromString(password)
	if err != nil {
		return err
	}
	blob := windows.CryptDataBlob{Size: uint32(len(pfx)), Data: &pfx[0]}
	imported, err := windows.PFXImportCertStore(&blob, secret, windows.CRYPT_MACHINE_KEYSET|windows.PKCS12_ALWAYS_CNG_KSP|windows.PKCS12_ALLOW_OVERWRITE_KEY)
	if err != nil {
		// A store that knows no CNG flags, or lets nobody use it, may take the key into the older kind of store.
		var older error
		if imported, older = windows.PFXImportCertStore(&blob, secret, windows.CRYPT_MACHINE_KEYSET); older != nil {
			return fmt.Errorf("%w; without CNG: %w", err, older)
		}
	}
	defer windows.CertCloseStore(imported, 0)
	for ctx, err := windows.CertEnumCertificatesInStore(imported, nil); ctx != nil && err == nil; ctx, err = windows.CertEnumCertificatesInStore(imported, ctx) {
		name := "CA"
		if bytes.Equal(unsafe.Slice(ctx.EncodedCert, ctx.Length), pair.Leaf.Raw) {
			name = "MY"
		}
		if err := addToMachineStore(name, ctx); err != nil {
			return err
		}
	}
	return nil
}

func addToMachineStore(name string, cert *windows.CertContext) error {
	store, err := windows.UTF16PtrFromString(name)
	if err != nil {
		return err
	}
	h, err := windows.CertOpenStore(windows.CERT_STORE_PROV_SYSTEM_W, 0, 0, windows.CERT_SYSTEM_STORE_LOCAL_MACHINE, uintptr(unsafe.Pointer(store)))
	if err != nil {
		return err
	}
	defer windows.CertCloseStore(h, 0)
	return windows.CertAddCertificateContextToStore(h, cert, windows.CERT_STORE_ADD_REPLACE_EXISTING, nil)
}
